"""Full attention beside ShadowKV with its values in three places: the largest batch, memory, speed, settings."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from longshadow.engine.planning.calibration import fitted
from longshadow.engine.planning.hardware import Hardware
from longshadow.engine.planning.implementation import PUBLISHED_HIT_RATE
from longshadow.engine.planning.memory import (
    RESERVED_DEVICE_BYTES,
    RESERVED_HOST_BYTES,
    USABLE_DEVICE_SHARE,
    Demand,
    demand,
)
from longshadow.engine.planning.model_shape import ModelShape
from longshadow.engine.planning.steps import Load, Machine, Stage, decode_stages, prefill_stages, total_seconds
from longshadow.engine.shadowkv.config import ShadowKVConfig

FULL_ATTENTION = "full attention"
PLACEMENTS: dict[str, ShadowKVConfig] = {
    "bf16 on the host": ShadowKVConfig(),
    "int8 on the host": ShadowKVConfig(value_dtype="int8", factor_dtype="int8"),
    "int8 on the device": ShadowKVConfig(value_store="device", value_dtype="int8", factor_dtype="int8"),
}
# Prompt tokens that are read at a time: few enough for their activations, many enough that what was read before, which
# every further piece reads again, does not dominate.
PREFILL_TOKENS = 8192
LARGEST_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to run on what.

    Args:
        num_prompt_tokens: of each sequence.
        num_new_tokens: that each generates; the prediction is for the last of them.
        batch: sequences; None asks for the largest batch.
        host_memory_bytes: of the machine; None: enough.
        hit_rate: share of candidates that stay from step to step.

    Raises:
        ValueError: a number is out of range, or the sequence longer than the model's positions.
    """

    shape: ModelShape
    hardware: Hardware
    num_prompt_tokens: int
    num_new_tokens: int
    batch: int | None = None
    host_memory_bytes: int | None = None
    hit_rate: float = PUBLISHED_HIT_RATE

    def __post_init__(self) -> None:
        for name, value in (
            ("the context", self.num_prompt_tokens),
            ("the number of new tokens", self.num_new_tokens),
            ("the batch", self.batch),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.hit_rate <= 1:
            raise ValueError(f"the hit rate must be between 0 and 1, got {self.hit_rate}")
        limit = self.shape.max_positions
        if limit is not None and self.num_tokens > limit:
            raise ValueError(
                f"{self.num_prompt_tokens:,} tokens and {self.num_new_tokens:,} new ones are more than the "
                f"{limit:,} positions of {self.shape.name}"
            )

    @property
    def num_tokens(self) -> int:
        """Of each sequence at its end."""
        return self.num_prompt_tokens + self.num_new_tokens

    @property
    def usable_device_bytes(self) -> int:
        """What weights, caches and workspaces may take."""
        return int(self.hardware.memory_bytes * USABLE_DEVICE_SHARE) - RESERVED_DEVICE_BYTES


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One way to run it.

    Attributes:
        config: None is full attention.
        batch: sequences; 0 where what was asked for does not fit.
        demand: of the batch, or of what does not fit.
        stages: of a decoding step; empty where nothing fits.
        first_token_seconds: of one prompt alone; None where nothing fits.
    """

    name: str
    config: ShadowKVConfig | None
    batch: int
    demand: Demand
    stages: tuple[Stage, ...] = ()
    first_token_seconds: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch / total_seconds(list(self.stages)) if self.stages else 0.0

    @property
    def slowest(self) -> tuple[Stage, float] | None:
        """The longest stage of a step, and its share of it."""
        if not self.stages:
            return None
        longest = max(self.stages, key=lambda stage: stage.seconds)
        return longest, longest.seconds / total_seconds(list(self.stages))


def compare(question: Question) -> list[Prediction]:
    """Full attention, then ShadowKV with each placement of its values, with or without residents, as is faster."""
    return [
        predict(question, FULL_ATTENTION, None),
        *(
            _best([predict(question, name, replace(placement, resident_factor=factor)) for factor in (None, 0)])
            for name, placement in PLACEMENTS.items()
        ),
    ]


def fastest(predictions: list[Prediction]) -> Prediction:
    """The most tokens/s; of equals, the first."""
    return max(predictions, key=lambda prediction: prediction.tokens_per_second)


def predict(question: Question, name: str, config: ShadowKVConfig | None) -> Prediction:
    """One configuration, at the batch asked for or the largest."""
    shape, prompt = question.shape, question.num_prompt_tokens

    def taking(batch: int) -> Demand:
        return demand(
            shape,
            config,
            num_prompt_tokens=prompt,
            num_new_tokens=question.num_new_tokens,
            batch=batch,
            prefill_chunk_size=PREFILL_TOKENS,
        )

    def fits(batch: int) -> bool:
        needed, host = taking(batch), question.host_memory_bytes
        return needed.device_bytes <= question.usable_device_bytes and (
            host is None or not needed.host_bytes or needed.host_bytes + RESERVED_HOST_BYTES <= host
        )

    batch = largest(fits) if question.batch is None else question.batch * fits(question.batch)
    if not batch:
        return Prediction(name=name, config=config, batch=0, demand=taking(question.batch or 1))
    machine = Machine(hardware=question.hardware, efficiency=fitted())
    load = Load(
        shape=shape,
        config=config,
        batch=batch,
        num_prompt_tokens=prompt,
        num_new_tokens=question.num_new_tokens,
        hit_rate=question.hit_rate,
    )
    reading = prefill_stages(shape, config, prompt, machine, prefill_chunk_size=PREFILL_TOKENS)
    return Prediction(
        name=name,
        config=config,
        batch=batch,
        demand=taking(batch),
        stages=tuple(decode_stages(load, machine)),
        first_token_seconds=total_seconds(reading),
    )


def largest(fits: Callable[[int], bool]) -> int:
    """The largest batch up to 4,096 that fits, 0 where not even one does; what fits, fits in a smaller batch."""
    low, high = 0, LARGEST_BATCH
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _best(variants: list[Prediction]) -> Prediction:
    """The most tokens/s; where none fits, what takes the least."""
    fitting = [variant for variant in variants if variant.batch]
    return fastest(fitting) if fitting else min(variants, key=lambda variant: variant.demand.device_bytes)
