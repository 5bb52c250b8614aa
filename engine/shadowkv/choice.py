"""Whether operators serve a model, whether its sequences decode together, and whether a step can be prepared ahead."""

from transformers import PreTrainedModel
from transformers.utils import logging

from longshadow import env
from longshadow.engine.ops import Operators, choose_backend, operators
from longshadow.engine.ops.backend import AUTO, REFERENCE, Shapes
from longshadow.engine.shadowkv.batch_memory import ROW_KINDS
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.decode_batch import DecodeBatch
from longshadow.lengths import LENGTH_DEPENDENT_ROPE, rope_kind, rope_parameters

logger = logging.get_logger(__name__)


def choose_operators(model: PreTrainedModel, config: ShadowKVConfig) -> Operators | None:
    """Kernels for this model's device and shapes, or what LONGSHADOW_BACKEND says; None: plain PyTorch does better.

    Raises ValueError for an impossible LONGSHADOW_BACKEND.
    """
    text_config = model.config.get_text_config(decoder=True)
    num_heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads
    shapes = Shapes(
        num_groups=num_heads // (getattr(text_config, "num_key_value_heads", None) or num_heads),
        key_dim=head_dim,
        value_dim=head_dim,
        dtype=model.dtype,
        factors=ROW_KINDS[config.factor_dtype],
    )
    backend = choose_backend(model.device, shapes=shapes)
    if backend == REFERENCE and env.backend() in (None, AUTO):
        return None
    return operators(model.device, backend, shapes)


def decode_batch(model: PreTrainedModel, config: ShadowKVConfig, chosen: Operators | None) -> DecodeBatch | None:
    """What decodes a model's sequences together; None, said once, where operators do not serve it."""
    if chosen is None:
        return None
    devices = {str(parameter.device) for parameter in model.parameters()}
    try:
        if len(devices) > 1:
            raise ValueError(f"the model is spread over {', '.join(sorted(devices))}")
        return DecodeBatch(chosen, config, model.device)
    except ValueError as error:
        logger.warning_once(f"sequences are decoded one by one: {error}")
        return None


def why_not_ahead(model: PreTrainedModel, batch: DecodeBatch | None, *, has_windows: bool) -> str | None:
    """Why steps of `model` cannot be prepared ahead of their launches; None where they can.

    `has_windows`: some of its layers are cached outside the batch.
    """
    if batch is None:
        return "operators do not run"
    if has_windows:
        return "the model has layers with sliding windows, whose caches move"
    kinds = {rope_kind(rope) for rope in rope_parameters(model.config.get_text_config(decoder=True).to_dict())}
    for kind in LENGTH_DEPENDENT_ROPE:
        if kind in kinds:
            return f"angles of {kind} RoPE depend on the length of the batch"
    return None
