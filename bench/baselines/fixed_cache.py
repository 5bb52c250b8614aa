"""Full attention as fast as it gets on a GPU: a full cache at fixed addresses, so that steps can be captured.

Each step writes its token over the last one; what it takes is what a step at that length takes.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import flash_attention_mask

SDPA, SDPA_FLASH, FLASH = (f"longshadow_bench_fixed_{name}" for name in ("sdpa", "sdpa_flash", "flash"))


class FixedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values [B, n, H, D] of one layer, as flash attention wants them."""

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the buffers are there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a new token [B, H, 1, D] and returns views [B, H, n, D] of all."""
        assert self.keys is not None and self.values is not None
        self.keys[:, -1] = key_states[:, :, 0]
        self.values[:, -1] = value_states[:, :, 0]
        return self.keys.transpose(1, 2), self.values.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys a mask would cover."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before the one that is written."""
        assert self.keys is not None
        return int(self.keys.shape[1]) - 1

    def get_max_length(self) -> int:
        """The capacity."""
        return self.get_seq_length() + 1


def random_fixed_cache(
    *,
    num_layers: int,
    batch_size: int,
    num_tokens: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Cache:
    """A cache of random tokens; the last one's place is the new token's."""
    generator = torch.Generator(device).manual_seed(seed)

    def tokens() -> torch.Tensor:
        shape = (batch_size, num_tokens, num_kv_heads, head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return Cache(layers=[FixedLayer(tokens(), tokens()) for _ in range(num_layers)])


def implementations(device: torch.device) -> dict[str, str]:
    """Names of the attention implementations that run here, by what readers know them as."""
    found = {"SDPA": SDPA}
    if device.type == "cuda":
        found["SDPA by flash attention"] = SDPA_FLASH
        if importlib.util.find_spec("flash_attn") is not None:
            found["flash-attn"] = FLASH
    return found


def _sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def _sdpa_flash(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(*args, **kwargs)


def _flash(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    attend = importlib.import_module("flash_attn").flash_attn_with_kvcache
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return attend(query, key, value, softmax_scale=scaling), None


for _name, _function in ((SDPA, _sdpa), (SDPA_FLASH, _sdpa_flash), (FLASH, _flash)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, flash_attention_mask)
