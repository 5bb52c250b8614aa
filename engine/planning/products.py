"""Bytes, operations and kernels of what every model does: products with weights, and full attention.

Legend: B sequences, n tokens, H KV heads, D head_dim, e bytes of an element.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from longshadow.engine.planning.hardware import Format
from longshadow.engine.planning.implementation import Implementation
from longshadow.engine.planning.model_shape import ModelShape

LOGIT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Work:
    """What something takes of each ceiling; two operations per multiply-add."""

    device_bytes: float = 0
    link_bytes: float = 0
    operations: Mapping[Format, float] = field(default_factory=dict)
    num_kernels: int = 0

    def __add__(self, other: "Work") -> "Work":
        """Both, at the same time or not."""
        formats = {**self.operations, **other.operations}
        return Work(
            device_bytes=self.device_bytes + other.device_bytes,
            link_bytes=self.link_bytes + other.link_bytes,
            operations={name: self.operations.get(name, 0) + other.operations.get(name, 0) for name in formats},
            num_kernels=self.num_kernels + other.num_kernels,
        )


def matrix_product(
    shape: ModelShape, batch: float, num_inputs: int, num_outputs: int, num_weights: float | None = None
) -> Work:
    """[B, inputs] x [inputs, outputs] of a layer's weights; `num_weights` where other than one matrix is read."""
    weights = num_inputs * num_outputs if num_weights is None else num_weights
    activations = batch * (num_inputs + num_outputs) * shape.element_bytes
    return Work(
        device_bytes=weights * shape.bytes_per_weight + activations,
        operations={shape.weight_format: 2 * batch * num_inputs * num_outputs},
        num_kernels=1,
    )


def qkv(shape: ModelShape, batch: int, implementation: Implementation) -> Work:
    """Query, key and value projections."""
    return _with_kernels(
        matrix_product(shape, batch, shape.hidden_size, shape.query_width + 2 * shape.key_width),
        implementation.qkv_kernels,
    )


def output_projection(shape: ModelShape, batch: int) -> Work:
    """The projection after attention."""
    return matrix_product(shape, batch, shape.query_width, shape.hidden_size)


def ffn(shape: ModelShape, batch: int, implementation: Implementation) -> Work:
    """The feed-forward network; of a mixture, every expert that some token is expected to go to.

    Of E experts and k per token, B tokens read E (1 - (1 - k/E)^B).
    """
    experts, active = shape.num_experts, shape.num_active_experts
    num_read = experts * (1 - (1 - active / experts) ** batch) if experts > 1 else 1
    num_up = (shape.num_ffn_matrices - 1) * shape.intermediate_size
    tokens = batch * active
    up = matrix_product(shape, tokens, shape.hidden_size, num_up, num_read * shape.hidden_size * num_up)
    activation = Work(device_bytes=tokens * (num_up + shape.intermediate_size) * shape.element_bytes)
    down_weights = num_read * shape.hidden_size * shape.intermediate_size
    down = matrix_product(shape, tokens, shape.intermediate_size, shape.hidden_size, down_weights)
    router = Work(device_bytes=shape.router_weights * shape.bytes_per_weight)
    return _with_kernels(up + activation + down + router, implementation.ffn_kernels)


def head(shape: ModelShape, batch: int, implementation: Implementation) -> Work:
    """Logits and sampling; the head is not quantised."""
    size = shape.hidden_size * shape.vocab_size
    return Work(
        device_bytes=size * shape.element_bytes + 2 * batch * shape.vocab_size * LOGIT_BYTES,
        operations={"bf16": 2 * batch * size},
        num_kernels=implementation.head_kernels,
    )


def full_attention(shape: ModelShape, batch: int, num_tokens: int, *, offloaded: bool = False) -> Work:
    """Keys and values of all tokens, 2 B n H D e, from device memory or, `offloaded`, over the link."""
    num_bytes = 2 * batch * num_tokens * shape.key_width * shape.element_bytes
    return Work(
        device_bytes=num_bytes,
        link_bytes=num_bytes if offloaded else 0,
        operations={"bf16": 4 * batch * num_tokens * shape.query_width},
        num_kernels=2,
    )


def _with_kernels(work: Work, num_kernels: int) -> Work:
    return Work(device_bytes=work.device_bytes, operations=work.operations, num_kernels=num_kernels)
