"""Long contexts with small caches, training over shared prefixes, compensation of quantised weights.

The public names are imported when first used; `import longshadow` needs neither torch nor transformers.
    from longshadow import ShadowKVCache, ShadowKVConfig
    from longshadow import PrefixTree, prefix_mask, share_prefixes
    from longshadow import PrefixSharingDPOTrainer, PrefixSharingGRPOTrainer, PrefixSharingRLOOTrainer
    from longshadow import compensate
    from longshadow import LLM, SamplingParams
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longshadow.compress.pipeline import compensate
    from longshadow.engine.prefix_sharing import PrefixTree, prefix_mask, share_prefixes
    from longshadow.engine.prefix_sharing.trainers import (
        PrefixSharingDPOTrainer,
        PrefixSharingGRPOTrainer,
        PrefixSharingRLOOTrainer,
    )
    from longshadow.engine.runtime import LLM, SamplingParams
    from longshadow.engine.shadowkv import ShadowKVCache, ShadowKVConfig

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "PrefixSharingDPOTrainer",
    "PrefixSharingGRPOTrainer",
    "PrefixSharingRLOOTrainer",
    "PrefixTree",
    "SamplingParams",
    "ShadowKVCache",
    "ShadowKVConfig",
    "__version__",
    "compensate",
    "prefix_mask",
    "share_prefixes",
]

_HOME = {
    "LLM": "longshadow.engine.runtime",
    "PrefixSharingDPOTrainer": "longshadow.engine.prefix_sharing.trainers",
    "PrefixSharingGRPOTrainer": "longshadow.engine.prefix_sharing.trainers",
    "PrefixSharingRLOOTrainer": "longshadow.engine.prefix_sharing.trainers",
    "PrefixTree": "longshadow.engine.prefix_sharing",
    "SamplingParams": "longshadow.engine.runtime",
    "ShadowKVCache": "longshadow.engine.shadowkv",
    "ShadowKVConfig": "longshadow.engine.shadowkv",
    "compensate": "longshadow.compress.pipeline",
    "prefix_mask": "longshadow.engine.prefix_sharing",
    "share_prefixes": "longshadow.engine.prefix_sharing",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'longshadow' has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
