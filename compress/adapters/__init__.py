"""LoRA adapters as files: written, read, described, verified, merged, and exported to what other runtimes load."""
