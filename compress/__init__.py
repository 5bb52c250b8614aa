"""Compression of a model's weights: home of EoRA (arXiv 2410.21271).

A quantised weight's error is compensated by a low-rank term fitted where the activations live, written as an
ordinary LoRA adapter, which `save_adapter` writes to a folder.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longshadow.compress.adapters.files import save_adapter

__all__ = ["save_adapter"]

# From the repository's root a bare import would find this folder and make a second copy of every class.
if __name__ == "compress":
    raise ImportError("import longshadow.compress, not compress")


def __getattr__(name: str) -> object:
    if name != "save_adapter":
        raise AttributeError(f"module 'longshadow.compress' has no attribute {name!r}")
    # It needs torch, which commands that answer at once do without.
    from longshadow.compress.adapters.files import save_adapter

    return save_adapter
