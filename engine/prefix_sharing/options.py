"""Options of prefix sharing."""

from dataclasses import dataclass
from typing import Literal

import torch

from longshadow.engine.prefix_sharing.attention import NAMES


@dataclass(frozen=True, kw_only=True)
class SharingOptions:
    """See `share_prefixes`."""

    minimum_ratio: float = 1.1
    verify_first_batch: bool = True
    on_mismatch: Literal["raise", "ordinary"] = "raise"
    attention: str = "auto"

    def __post_init__(self) -> None:
        if not self.minimum_ratio >= 1:
            raise ValueError(f"minimum_ratio must be at least 1, got {self.minimum_ratio}")
        if self.on_mismatch not in ("raise", "ordinary"):
            raise ValueError(f"on_mismatch must be 'raise' or 'ordinary', got {self.on_mismatch!r}")
        if self.attention not in NAMES:
            raise ValueError(f"attention must be one of {', '.join(NAMES)}, got {self.attention!r}")
        if self.attention == "varlen" and not torch.cuda.is_available():
            raise ValueError("attention='varlen' cannot run here: flash attention needs a CUDA device")
