"""ShadowKV (arXiv 2410.21465): a low-rank pre-RoPE key cache with sparse exact reconstruction per step.

The public names are imported when first used: a configuration alone needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longshadow.engine.shadowkv.cache import ShadowKVCache, Statistics
    from longshadow.engine.shadowkv.config import ShadowKVConfig
    from longshadow.engine.shadowkv.graphs import DecodeGraphs, graphed_decoding
    from longshadow.engine.shadowkv.memory import MemoryReport

__all__ = ["DecodeGraphs", "MemoryReport", "ShadowKVCache", "ShadowKVConfig", "Statistics", "graphed_decoding"]

_HOME = {
    "DecodeGraphs": "graphs",
    "MemoryReport": "memory",
    "ShadowKVCache": "cache",
    "ShadowKVConfig": "config",
    "Statistics": "cache",
    "graphed_decoding": "graphs",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
