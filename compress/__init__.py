"""Compression of a model's weights: home of EoRA (arXiv 2410.21271).

A quantised weight's error is compensated by a low-rank term fitted where the activations live, written as an
ordinary LoRA adapter.
"""

# From the repository's root a bare import would find this folder and make a second copy of every class.
if __name__ == "compress":
    raise ImportError("import longshadow.compress, not compress")
