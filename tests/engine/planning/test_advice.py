"""What is advised: the largest batch, limits, choices, and that more never costs."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.engine.planning.advice import PLACEMENTS, Question, compare, fastest, largest, predict
from longshadow.engine.planning.hardware import GPUS, H200, RTX_4090
from longshadow.engine.planning.memory import RESERVED_HOST_BYTES
from longshadow.engine.planning.reading import SHAPES
from longshadow.engine.shadowkv.config import ShadowKVConfig

QUESTION = Question(shape=SHAPES["llama-3.1-8b"], hardware=H200, num_prompt_tokens=122 * 1024, num_new_tokens=64)
NAMES = ["full attention", "bf16 on the host", "int8 on the host", "int8 on the device"]


def test_four_ways_to_run_it() -> None:
    predictions = compare(QUESTION)
    assert [prediction.name for prediction in predictions] == NAMES
    full, bf16, int8, device = predictions
    assert full.config is None and full.demand.host_bytes == device.demand.host_bytes == 0
    assert bf16.config is not None and (bf16.config.value_store, bf16.config.value_dtype) == ("host", None)
    assert int8.config is not None and (int8.config.value_store, int8.config.value_dtype) == ("host", "int8")
    assert device.config is not None and (device.config.value_store, device.config.value_dtype) == ("device", "int8")
    assert bf16.demand.host_bytes > bf16.batch * 124_928 * 65_536, "values of all layers"
    for prediction in predictions:
        assert prediction.demand.device_bytes <= QUESTION.usable_device_bytes
        assert prediction.batch > 0 and prediction.first_token_seconds and prediction.slowest


def test_the_batch_is_the_largest_that_fits() -> None:
    for prediction in compare(QUESTION):
        given_batch = {p.name: p for p in compare(replace(QUESTION, batch=prediction.batch))}[prediction.name]
        assert given_batch.batch == prediction.batch
        too_many = {p.name: p for p in compare(replace(QUESTION, batch=prediction.batch + 1))}[prediction.name]
        assert not too_many.batch or too_many.tokens_per_second <= prediction.tokens_per_second


def test_host_memory_is_a_limit() -> None:
    limited = replace(QUESTION, host_memory_bytes=64 * 10**9)
    without, within = compare(QUESTION), compare(limited)
    assert [p.batch for p in within if p.config is None or p.config.value_store == "device"] == [
        p.batch for p in without if p.config is None or p.config.value_store == "device"
    ]
    for prediction in within:
        assert prediction.demand.host_bytes + RESERVED_HOST_BYTES <= 64 * 10**9
    assert within[1].batch < without[1].batch and within[1].batch < within[2].batch, "int8 is half as large"


def test_what_does_not_fit_is_told_with_what_it_would_take() -> None:
    small = replace(QUESTION, shape=SHAPES["llama-3.1-70b"], hardware=RTX_4090)
    predictions = compare(small)
    assert all(not p.batch and not p.tokens_per_second and p.slowest is None for p in predictions)
    assert all(p.demand.device_bytes > small.usable_device_bytes for p in predictions)
    assert not fastest(predictions).batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_prompt_tokens=0), "the context must be at least 1"),
        (dict(num_new_tokens=0), "the number of new tokens must be at least 1"),
        (dict(batch=0), "the batch must be at least 1"),
        (dict(hit_rate=1.5), "the hit rate must be between 0 and 1"),
        (dict(num_prompt_tokens=131_072), "more than the 131,072 positions of llama-3.1-8b"),
    ],
)
def test_questions_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(QUESTION, **changes)


def test_largest() -> None:
    assert [largest(lambda batch, limit=limit: batch <= limit) for limit in (0, 1, 37, 4096)] == [0, 1, 37, 4096]  # type: ignore[misc]


SMALL = replace(SHAPES["smollm2-135m"], max_positions=None)
questions = st.builds(
    Question,
    shape=st.sampled_from([SHAPES["llama-3-8b-1m"], SHAPES["glm-4-9b-1m"], SMALL]),
    hardware=st.sampled_from(list(GPUS.values())),
    num_prompt_tokens=st.integers(2, 500).map(lambda units: 1024 * units),
    num_new_tokens=st.just(32),
    host_memory_bytes=st.none() | st.integers(8, 512).map(lambda gigabytes: gigabytes * 10**9),
    hit_rate=st.floats(0, 1),
)  # fmt: skip


@settings(max_examples=12, deadline=None, derandomize=True)
@given(question=questions, more=st.integers(1, 100))
def test_more_context_is_never_faster(question: Question, more: int) -> None:
    longer = replace(question, num_prompt_tokens=question.num_prompt_tokens + 1024 * more)
    for short, long in zip(compare(question), compare(longer), strict=True):
        assert long.tokens_per_second <= short.tokens_per_second


@settings(max_examples=12, deadline=None, derandomize=True)
@given(question=questions, more=st.floats(1, 4))
def test_more_memory_is_never_worse(question: Question, more: float) -> None:
    hardware = replace(question.hardware, memory_bytes=int(question.hardware.memory_bytes * more))
    host = None if question.host_memory_bytes is None else int(question.host_memory_bytes * more)
    larger = replace(question, hardware=hardware, host_memory_bytes=host)
    for before, after in zip(compare(question), compare(larger), strict=True):
        assert after.tokens_per_second >= before.tokens_per_second
    for config in (None, *PLACEMENTS.values()):
        assert predict(larger, "it", config).batch >= predict(question, "it", config).batch


def test_more_hits_are_never_slower() -> None:
    speeds = [[p.tokens_per_second for p in compare(replace(QUESTION, hit_rate=rate))] for rate in (0.0, 0.3, 0.9)]
    assert speeds[0][1:] < speeds[1][1:] < speeds[2][1:] and speeds[0][0] == speeds[2][0]


def test_the_default_settings_are_a_users() -> None:
    """Unless nothing else fits, residents stay as a GPU's default has it."""
    host = compare(QUESTION)[1]
    assert host.config == ShadowKVConfig()
