"""ShadowKV (arXiv 2410.21465): a low-rank pre-RoPE key cache with sparse exact reconstruction per step."""

from longshadow.engine.shadowkv.cache import ShadowKVCache, Statistics
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.memory import MemoryReport

__all__ = ["MemoryReport", "ShadowKVCache", "ShadowKVConfig", "Statistics"]
