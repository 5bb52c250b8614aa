"""What runs a model: `engine.shadowkv` is its compressed cache."""

# From the repository's root a bare import would find this folder and make a second copy of every class.
if __name__ == "engine":
    raise ImportError("import longshadow.engine, not engine")
