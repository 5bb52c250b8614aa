"""Small engines for tests: a random model over bytes in fp64, whose caches are compressed after a few tokens."""

from typing import Any

import torch
from transformers import LlamaForCausalLM

from longshadow import LLM, ShadowKVConfig
from tests.tiny_models import tiny_model, tiny_tokenizer

SMALL = dict(budget_tokens=32, rank=8, dense_threshold=64, local_tokens=16, segment_tokens=64, num_outlier_chunks=2)
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def peaked_model() -> LlamaForCausalLM:
    """The tiny model in fp64, its keys and queries widened so that attention, and mistakes in it, matter."""
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj")):
                parameter.mul_(20)
            elif "embed" in name:
                parameter.mul_(10)
    return model.double()


def small_config(**changes: Any) -> ShadowKVConfig:
    """Compresses contexts of more than 64 tokens."""
    return ShadowKVConfig(**{**SMALL, **changes})


def engine(**changes: Any) -> LLM:
    """An engine over `peaked_model` with a tokenizer of bytes."""
    arguments: dict[str, Any] = {
        "model": changes.pop("model", None) or peaked_model(),
        "tokenizer": tiny_tokenizer(CHAT_TEMPLATE),
        "shadowkv": small_config(),
        "max_num_seqs": 4,
        "max_prefill_tokens": 128,
        "device_memory": "1G",
        **changes,
    }
    return LLM(arguments.pop("model"), **arguments)
