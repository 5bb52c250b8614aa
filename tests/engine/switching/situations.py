"""Implementations that a model's attention can have, and wrappers that a model can be in.

flash-attn has no build for CPUs: its functions are stood in for by SDPA, transformers' own code around them is not.
"""

import copy
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.modeling_flash_attention_utils as flash
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HUB_KERNEL = "kernels-community/flash-attn2"


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A way to run a model.

    Attributes:
        implementation: of its attention.
        wrap: what is called, made of the model.
        learns: gradients exist; flex_attention has none on a CPU.
        compiled: torch.compile traces what is called, which takes its time.
        pickles: the model can be pickled as it is.
    """

    implementation: str = "sdpa"
    wrap: Callable[[Any], Any] = lambda model: model
    learns: bool = True
    compiled: bool = False
    pickles: bool = True


def _with_adapter(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()


def _compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def _offloaded(model: Any) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def _dispatched(model: Any) -> Any:
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


SITUATIONS = {
    "eager": Situation(implementation="eager"),
    "sdpa": Situation(),
    "flex_attention": Situation(implementation="flex_attention", learns=False),
    "flash_attention_2": Situation(implementation="flash_attention_2"),
    "flash_attention_3": Situation(implementation="flash_attention_3"),
    "kernel of the Hub": Situation(implementation=HUB_KERNEL),
    "PEFT": Situation(wrap=_with_adapter),
    "torch.compile": Situation(wrap=lambda model: torch.compile(model, backend="eager"), compiled=True),
    "compiled in place": Situation(wrap=_compiled_in_place, compiled=True),
    "hooks of accelerate": Situation(wrap=_dispatched, pickles=False),
    "offloaded": Situation(wrap=_offloaded, learns=False),
    "deep copy": Situation(wrap=copy.deepcopy),
}


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """As `set_attn_implementation`, without the Hub."""
    if implementation == HUB_KERNEL:
        model.config._attn_implementation = implementation
    else:
        model.set_attn_implementation(implementation)


@contextmanager
def every_implementation(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, all implementations of `SITUATIONS` exist on a CPU."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> torch.Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        # flash-attn aligns its mask to the last key.
        num_new, num_keys = query.shape[2], key.shape[2]
        mask = torch.ones(num_new, num_keys, dtype=torch.bool).tril(num_keys - num_new) if causal else None
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=softmax_scale, enable_gqa=True
        ).transpose(1, 2)

    def attend_varlen(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        max_seqlen_q: Any = None,
        max_seqlen_k: Any = None,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> torch.Tensor:
        bounds = [list(zip(cut[:-1].tolist(), cut[1:].tolist(), strict=True)) for cut in (cu_seqlens_q, cu_seqlens_k)]
        rows = zip(*bounds, strict=True)
        return torch.cat(
            [
                attend(query[None, a:b], key[None, c:d], value[None, c:d], softmax_scale=softmax_scale, causal=causal)[
                    0
                ]
                for (a, b), (c, d) in rows
            ]
        )

    for name in ("flash_attn", "flash_attn_interface", "flash_attn.bert_padding"):
        module: Any = types.ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        module.flash_attn_func, module.flash_attn_varlen_func = attend, attend_varlen
        module.flash_attn_with_kvcache = None
        module.pad_input, module.unpad_input = flash._pad_input, flash._unpad_input
        patch.setitem(sys.modules, name, module)
    patch.setattr(flash, "is_flash_attn_2_available", lambda *_, **__: True)
    patch.setattr(flash, "is_flash_attn_3_available", lambda *_, **__: True)
    patch.setattr(flash, "_loaded_implementation", None)
    patch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    patch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    patch.setattr(AttentionMaskInterface, "_global_mapping", dict(AttentionMaskInterface._global_mapping))
    AttentionInterface.register(HUB_KERNEL, ALL_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register(HUB_KERNEL, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    yield
