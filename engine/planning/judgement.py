"""The cost model beside every published row, and why some rows cannot fit."""

from collections.abc import Iterator
from dataclasses import dataclass

from longshadow.engine.planning.calibration import MEAN_NEW_TOKENS, PUBLISHED_MODEL, block_load, fitted
from longshadow.engine.planning.hardware import A100
from longshadow.engine.planning.implementation import ORIGINAL, original_config
from longshadow.engine.planning.model_shape import ModelShape
from longshadow.engine.planning.published import (
    BLOCK_COLUMNS,
    BLOCKS,
    MILLION_BATCH,
    MILLION_CONTEXT,
    MILLION_OFFLOADED,
    MILLION_QUEST,
    MILLION_SHADOWKV,
    PREFILLS,
    SMALL_BATCHES,
    THROUGHPUTS,
    published_budget,
)
from longshadow.engine.planning.reading import SHAPES
from longshadow.engine.planning.steps import (
    Efficiency,
    Load,
    Machine,
    decode_stages,
    layer_operators,
    prefill_attention,
    total_seconds,
)

TOLERANCE = 0.2
MANY = 100_000

EXPLAINED = {
    "group_max": "torch.max with indices reduces four numbers at a time with a generic kernel, bound by neither bytes "
    "nor launches: it takes 0.07 ms whatever the batch. The fused operators have no such pass.",
    "rebuild_keys": "the gathered product reaches neither ceiling: 6.4 GFLOP and 0.3 GB take 1.4 ms. It is hidden "
    "behind the fetch, so the throughputs do not show it; a fused operator has to be measured.",
    "svd": "torch.svd of the keys; this package takes the basis from a Gram matrix. Others find the published times "
    "too short (issue 13 of the original).",
    "quest": "another method.",
    "244K x 2: ShadowKV": "the step moves the bytes of 122K x 4, which took 34.8 ms, and took 41.3 ms: sixteen rows "
    "of 31K chunks do not fill the device, and how a kernel is spread over it is not modelled.",
}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A published number and the model's; None where the model has nothing to say."""

    name: str
    published: float
    predicted: float | None
    explanation: str | None = None

    @property
    def error(self) -> float | None:
        """Relative."""
        return None if self.predicted is None else self.predicted / self.published - 1

    @property
    def fits(self) -> bool:
        """Within the tolerance."""
        return self.error is not None and abs(self.error) <= TOLERANCE


def judge() -> list[Judged]:
    """Every number of tables 3, 4, 12, 13 and 14."""
    return [*_blocks(), *_prefills(), *_throughputs(), *_small_batches(), *_million()]


def original_machine(efficiency: Efficiency | None = None) -> Machine:
    """The machine and implementation of the published measurements."""
    return Machine(hardware=A100, efficiency=efficiency or fitted(), implementation=ORIGINAL)


def published_load(shape: ModelShape, context: int, batch: int, *, full: bool, offloaded: bool = False) -> Load:
    """A published decoding run, halfway through."""
    return Load(
        shape=shape,
        config=None if full else original_config(published_budget(context)),
        batch=batch,
        num_prompt_tokens=1024 * context,
        num_new_tokens=MEAN_NEW_TOKENS,
        offloaded=offloaded,
    )


def _blocks() -> Iterator[Judged]:
    machine = original_machine()
    for row in BLOCKS:
        works = layer_operators(block_load(row), ORIGINAL)
        for column, published in zip(BLOCK_COLUMNS, row.milliseconds, strict=True):
            yield Judged(
                name=f"block, {row.context}K x {row.batch}: {column}",
                published=published,
                predicted=1e3 * machine.seconds(works[column]),
                explanation=EXPLAINED.get(column),
            )


def _prefills() -> Iterator[Judged]:
    machine = original_machine()
    for row in PREFILLS:
        predicted = 1e3 * machine.seconds(prefill_attention(PUBLISHED_MODEL, 1024 * row.context))
        yield Judged(name=f"prefill, {row.context}K: attention", published=row.attention, predicted=predicted)
        yield Judged(
            name=f"prefill, {row.context}K: svd", published=row.svd, predicted=None, explanation=EXPLAINED["svd"]
        )


def _throughputs() -> Iterator[Judged]:
    for row in THROUGHPUTS:
        shape = SHAPES[row.model]

        def predicted(batch: int, *, full: bool, efficiency: Efficiency | None = None) -> float:
            load = published_load(shape, row.context, batch, full=full)  # noqa: B023 (called at once)
            return tokens_per_second(load, efficiency)

        name = f"{row.model}, {row.context}K"
        yield Judged(
            name=f"{name} x {row.full_batch}: full",
            published=row.full,
            predicted=predicted(row.full_batch, full=True),
        )
        yield Judged(
            name=f"{name} x {row.shadowkv_batch}: ShadowKV",
            published=row.shadowkv,
            predicted=predicted(row.shadowkv_batch, full=False),
        )
        yield Judged(
            name=f"{name} x {row.shadowkv_batch}: full, projected",
            published=row.same_batch,
            predicted=predicted(row.shadowkv_batch, full=True),
        )
        # The paper's bound is that of the full bandwidth, and so is the model's beside it.
        yield Judged(
            name=f"{name} x infinity: full, bound",
            published=row.infinite_batch,
            predicted=predicted(MANY, full=True, efficiency=Efficiency()),
        )


def _small_batches() -> Iterator[Judged]:
    for row in SMALL_BATCHES:
        name = f"{row.context}K x {row.batch}"
        for label, published, full in (("full", row.full, True), ("ShadowKV", row.shadowkv, False)):
            yield Judged(
                name=f"{PUBLISHED_MODEL.name}, {name}: {label}",
                published=published,
                predicted=tokens_per_second(published_load(PUBLISHED_MODEL, row.context, row.batch, full=full)),
                explanation=EXPLAINED.get(f"{name}: {label}"),
            )


def _million() -> Iterator[Judged]:
    name = f"{PUBLISHED_MODEL.name}, {MILLION_CONTEXT}K x {MILLION_BATCH}"
    for label, published, offloaded in (
        ("full, cache on the host", MILLION_OFFLOADED, True),
        ("ShadowKV", MILLION_SHADOWKV, False),
    ):
        load = published_load(PUBLISHED_MODEL, MILLION_CONTEXT, MILLION_BATCH, full=offloaded, offloaded=offloaded)
        yield Judged(name=f"{name}: {label}", published=published, predicted=tokens_per_second(load))
    yield Judged(name=f"{name}: Quest", published=MILLION_QUEST, predicted=None, explanation=EXPLAINED["quest"])


def tokens_per_second(load: Load, efficiency: Efficiency | None = None) -> float:
    """Of all sequences together, with the original implementation."""
    return load.batch / total_seconds(decode_stages(load, original_machine(efficiency)))
