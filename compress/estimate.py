"""What a compensation will take, before it starts: memory, disk and time."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from longshadow.compress import krylov
from longshadow.compress.blocks import compensated_blocks, layer_shape, linear_layers
from longshadow.compress.criterion import Method
from longshadow.compress.pipeline import SENSITIVITY_SAMPLES
from longshadow.compress.ranks import GAIN_SAMPLES
from longshadow.compress.statistics import input_moments_are_cheaper

FP32, FP64 = 4, 8
# Operations of an eigendecomposition of a symmetric matrix, in cubes of its size.
EIGENDECOMPOSITION = 9
SPEED_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes and seconds.

    memory = quantized + original + max(states + max(block, gradients), logits): the weights of both models (of an
    original that stays on disk, its largest block), and either the inputs of a block for all samples with what is
    computed for its layers, or for outputs to be weighed, or, while quality is measured, logits.

    Attributes:
        states: 2 N L d, for N samples of L tokens and hidden size d: inputs of this block and of the next.
        block: of the largest block, W, R and a copy per layer, its moments, and what the solver makes of them.
        gradients: with the method fisher, inputs of all blocks for 8 samples, and of one sample the activations in a
            block and 4 L V, its logits with their logarithms and the gradients of both, in fp32.
        logits: 4 L V, of both models with their logarithms, in fp32.
        adapter: on disk, at most.
    """

    quantized: int
    original: int
    states: int
    block: int
    gradients: int
    logits: int
    adapter: int
    seconds: float

    @property
    def memory(self) -> int:
        """In all."""
        return self.quantized + self.original + max(self.states + max(self.block, self.gradients), self.logits)

    @property
    def minutes(self) -> int:
        """At least one."""
        return max(1, round(self.seconds / 60))


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Operations a second of a plain matrix product."""

    fp32: float
    fp64: float

    @classmethod
    def measured(cls, device: torch.device) -> "Speed":
        """Of this machine, in half a second."""
        return cls(**{name: _speed(getattr(torch, f"float{name[2:]}"), device) for name in ("fp32", "fp64")})


def estimated(
    model: nn.Module,
    *,
    quantized_bytes: int,
    itemsize: int,
    num_samples: int,
    length: int,
    rank: int | None,
    budget: int | None,
    adapter_itemsize: int,
    methods: Sequence[Method],
    head: bool,
    original_on_disk: bool,
    speed: Speed,
) -> Estimate:
    """For a model on the meta device or a real one.

    Args:
        model: of the architecture, dense; its weights are not read.
        quantized_bytes: of the quantised model in memory.
        itemsize: of the original's weights and of hidden states, in memory.
        rank, budget: one of them; of the adapter.
        methods: that are tried.
        head: whether it is compensated, too, as one more block.
        original_on_disk: whether the original stays there but for the block at hand.
    """
    blocks = [
        [layer_shape(layer) for layer in linear_layers(block).values()]
        for block in compensated_blocks(model, head=head)
    ]
    weights = sum(parameter.numel() for parameter in model.parameters())
    largest = max(sum(m * n for m, n in shapes) for shapes in blocks)
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    tokens, hidden = num_samples * length, int(config.hidden_size)
    adapter = budget if budget is not None else sum((m + n) * min(rank or 0, m, n) for it in blocks for m, n in it)
    in_blocks = sum(m * n for shapes in blocks for m, n in shapes)
    in_head = 0 if head else hidden * int(config.vocab_size)  # where it is not among the blocks
    forward = 2 * in_blocks * tokens
    passes = 3 + (min(1, GAIN_SAMPLES / num_samples) if budget is not None else 0)
    num_methods, weighed = len(methods), min(num_samples, SENSITIVITY_SAMPLES) if "fisher" in methods else 0
    moments = sum(_moment_operations(m, n) for it in blocks for m, n in it) * tokens
    # A third as many tokens as for calibration, by the original, the quantised model, and that with the adapter; to
    # choose a method, as many again, by the original and by each compensation.
    runs = 3 + (1 + num_methods if num_methods > 1 else 0)
    measuring = runs * 2 * (in_blocks + in_head) * tokens / 3
    # Forward twice and back once, as far as inputs.
    weighing = 3 * 2 * (in_blocks + in_head) * weighed * length
    logits = 4 * length * int(config.vocab_size) * FP32
    activations = 2 * length * max(sum(m + n for m, n in shapes) for shapes in blocks)
    solving = sum(_solver_operations(m, n, rank) for it in blocks for m, n in it)
    return Estimate(
        quantized=quantized_bytes,
        original=(largest if original_on_disk else weights) * itemsize,
        states=2 * tokens * hidden * itemsize,
        block=max(_block_bytes(shapes) for shapes in blocks),
        gradients=((len(blocks) + 1) * weighed * length * hidden + activations) * itemsize + logits if weighed else 0,
        logits=logits,
        adapter=adapter * adapter_itemsize,
        seconds=num_methods * ((passes * forward + moments) / speed.fp32 + solving / speed.fp64)
        + (measuring + weighing) / speed.fp32,
    )


def _block_bytes(shapes: Iterable[tuple[int, int]]) -> int:
    shapes = list(shapes)
    kept = sum(3 * m * n * FP32 + min(m, n) ** 2 * FP64 for m, n in shapes)
    # The solver works on one layer at a time, in fp64: R, R C, G, its eigenvectors.
    return kept + max(2 * m * n * FP64 + 3 * min(m, n) ** 2 * FP64 for m, n in shapes)


def _moment_operations(m: int, n: int) -> int:
    return 2 * n * n if input_moments_are_cheaper(n, [m]) else 2 * m * (m + n)


def _solver_operations(m: int, n: int, rank: int | None) -> int:
    """At most; of a whole spectrum where ranks are not given, since they follow from it."""
    if rank is not None and krylov.is_worthwhile(min(m, n), rank):
        return krylov.MAXIMUM_STEPS * 2 * (2 * m * n + n * n) * (rank + krylov.OVERSAMPLING)
    return 4 * m * n * min(m, n) + EIGENDECOMPOSITION * min(m, n) ** 3


def _speed(dtype: torch.dtype, device: torch.device) -> float:
    matrix = torch.ones(SPEED_SIZE, SPEED_SIZE, dtype=dtype, device=device)
    times = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        times.append(time.perf_counter() - start)
    return 2 * SPEED_SIZE**3 / min(times)
