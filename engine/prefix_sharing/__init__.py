"""Prefix sharing (arXiv 2410.20305): rows of a training batch that begin alike are computed once."""

from longshadow.engine.prefix_sharing.backbone import disable_prefix_sharing, enable_prefix_sharing, share_prefixes
from longshadow.engine.prefix_sharing.callback import PrefixSharingCallback
from longshadow.engine.prefix_sharing.mask import prefix_mask
from longshadow.engine.prefix_sharing.report import SharingReport
from longshadow.engine.prefix_sharing.tree import PrefixTree

__all__ = [
    "PrefixSharingCallback",
    "PrefixTree",
    "SharingReport",
    "disable_prefix_sharing",
    "enable_prefix_sharing",
    "prefix_mask",
    "share_prefixes",
]
