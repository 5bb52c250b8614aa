"""What a run would take, against what it takes."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longshadow import compensate
from longshadow.compress.criterion import METHODS
from longshadow.compress.estimate import Speed, estimated
from longshadow.compress.rounding import RoundToNearest, finest_rounding
from longshadow.compress.storage import stored_bits_per_weight
from tests.compress.test_pipeline import round_to_nearest, with_rounded_head
from tests.tiny_models import tiny_model

SPEED = Speed(fp32=1e9, fp64=1e9)


def estimate_of(model: torch.nn.Module, **changes: object) -> object:
    options = dict(
        quantized_bytes=100,
        itemsize=4,
        num_samples=8,
        length=64,
        rank=8,
        budget=None,
        adapter_itemsize=2,
        methods=("eora",),
        head=False,
        original_on_disk=False,
        speed=SPEED,
    )
    return estimated(model, **(options | changes))  # type: ignore[arg-type]


def test_sizes_are_those_of_the_model(samples: torch.Tensor) -> None:
    model = tiny_model()
    estimate = estimate_of(model)
    assert estimate.original == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert estimate.states == 2 * 8 * 64 * model.config.hidden_size * 4
    result = compensate(model, round_to_nearest(model), samples, rank=8)
    assert estimate.adapter == 2 * result.num_weights
    assert estimate_of(model, rank=None, budget=500).adapter == 1000
    assert estimate.memory >= estimate.quantized + estimate.original + estimate.states


def test_the_head_is_counted(samples: torch.Tensor) -> None:
    model = tiny_model()
    plain, estimate = estimate_of(model), estimate_of(model, head=True)
    quantized = with_rounded_head(round_to_nearest(model))
    assert estimate.adapter == 2 * compensate(model, quantized, samples, rank=8, head=True).num_weights
    assert estimate.adapter - plain.adapter == 2 * 8 * (model.config.vocab_size + model.config.hidden_size)
    assert estimate.block > plain.block and estimate.seconds > plain.seconds


def test_more_work_takes_more() -> None:
    model = tiny_model()
    plain = estimate_of(model)
    assert estimate_of(model, original_on_disk=True).memory < plain.memory
    assert estimate_of(model, num_samples=16).memory > plain.memory
    assert estimate_of(model, num_samples=16).seconds > plain.seconds
    # Measuring runs the original once, whatever the number of methods.
    assert 1.5 * plain.seconds < estimate_of(model, methods=METHODS[:3]).seconds < 3 * plain.seconds
    weighed = estimate_of(model, methods=("fisher",))
    assert weighed.seconds > plain.seconds and plain.gradients == 0
    # Inputs of the two blocks and of what follows them, while the logits of a sample are differentiated.
    assert weighed.gradients > 3 * 8 * 64 * model.config.hidden_size * 4 + weighed.logits
    large = estimate_of(model, methods=("fisher",), length=4096)
    assert large.memory >= large.quantized + large.original + large.states + large.gradients
    assert estimate_of(model, speed=Speed(fp32=2e9, fp64=2e9)).seconds == plain.seconds / 2


def test_low_ranks_of_large_layers_take_less_to_solve() -> None:
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, vocab_size=32)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    seconds = {rank: estimate_of(model, rank=rank).seconds for rank in (8, 64, 512)}
    assert seconds[8] < seconds[64] < seconds[512]
    # Ranks that follow from a budget need all gains.
    assert seconds[64] < estimate_of(model, rank=None, budget=10**6).seconds


def test_the_finest_rounding_within_a_size() -> None:
    assert finest_rounding(4.0, {64, 128}) == RoundToNearest(bits=3, group=32)
    assert finest_rounding(5.0, {64}) == RoundToNearest(bits=4, group=32)  # rather than 3 bits in groups of 16
    assert finest_rounding(4.0, {48}) == RoundToNearest(bits=2, group=16)
    assert finest_rounding(1.0, {64}) is None


def test_rounding() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    rounded = RoundToNearest(bits=3, group=16)(weight)
    for row, original in zip(rounded, weight, strict=True):
        for group, given in zip(row.split(16), original.split(16), strict=True):
            assert len(group.unique()) <= 8
            step = (given.max() - given.min()) / 7
            assert (group - given).abs().max() <= step / 2 + 1e-6


def test_stored_bits() -> None:
    assert stored_bits_per_weight([torch.nn.Linear(8, 8)]) is None
    packed = torch.nn.Linear(16, 8, bias=False)
    packed.weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    packed.register_buffer("scale", torch.zeros(8, 1))
    assert stored_bits_per_weight([packed]) == 4 + 8 * 4 * 8 / 128
