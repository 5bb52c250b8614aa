"""What a saved document must have in common with the engine that loads it."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from longshadow.engine.runtime.shapes import LayerShape
from longshadow.engine.shadowkv import ShadowKVConfig
from longshadow.lengths import rope_parameters

SAMPLED_ELEMENTS = 256
# What does not change a document's segments: how they are attended to, and where they are kept.
USES = ("budget_tokens", "budget_fraction", "candidate_factor", "resident_factor", "value_store", "prefill_chunk_size")
SHAPES = ("num_kv_heads", "key_dim", "value_dim", "window")


def model_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of every parameter's and buffer's name, shape, dtype and a sample of its elements."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        for part, plain in _plain_tensors(name, tensor.detach()):
            digest.update(f"{part} {list(plain.shape)} {plain.dtype}\n".encode())
            flat = plain.reshape(-1)
            step = max(1, flat.numel() // SAMPLED_ELEMENTS)
            sample = flat[::step][:SAMPLED_ELEMENTS].cpu().contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor, or those that a library's own kind, such as torchao's weights, is made of: it need not be sliced."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    parts, _ = tensor.__tensor_flatten__()
    for part in parts:
        yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))


def requirements(
    model: PreTrainedModel, shapes: list[LayerShape], config: ShadowKVConfig, fingerprint: str
) -> dict[str, Any]:
    """Everything that makes segments of one engine those of another, as JSON."""
    text_config = model.config.get_text_config(decoder=True)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in USES}
    return {
        "model": fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rope": [{key: rope[key] for key in sorted(rope)} for rope in rope_parameters(text_config.to_dict())],
        "shadowkv": settings,
        "layers": [{name: getattr(shape, name) for name in SHAPES} for shape in shapes],
    }
