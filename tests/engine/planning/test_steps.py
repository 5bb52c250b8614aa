"""Times from work: the slowest ceiling, what runs at once, prompts in one piece and in several."""

from dataclasses import replace

import pytest

from longshadow.engine.planning.hardware import H200
from longshadow.engine.planning.implementation import FUSED, ORIGINAL
from longshadow.engine.planning.products import Work
from longshadow.engine.planning.reading import SHAPES
from longshadow.engine.planning.steps import (
    Efficiency,
    Load,
    Machine,
    decode_stages,
    layer_operators,
    parked_history,
    prefill_stages,
    total_seconds,
)
from longshadow.engine.shadowkv.config import ShadowKVConfig

SHAPE = SHAPES["llama-3.1-8b"]
MACHINE = Machine(hardware=H200, efficiency=Efficiency(bandwidth=0.5, link=0.25, tensor_cores=0.125, launch=2))
LOAD = Load(shape=SHAPE, config=ShadowKVConfig(), batch=4, num_prompt_tokens=65_536, num_new_tokens=64)


def test_the_slowest_ceiling_and_the_launches() -> None:
    launches = 3 * 3.4e-6 / 2
    for work, ceiling in (
        (Work(device_bytes=2.4e12, num_kernels=3), "device memory"),
        (Work(link_bytes=63e9 / 4, num_kernels=3), "host link"),
        (Work(operations={"bf16": 989e12 / 8}, num_kernels=3), "tensor cores"),
    ):
        assert MACHINE.seconds(work) == pytest.approx(1 + launches)
        assert MACHINE.seconds(work + Work(device_bytes=1e12)) == pytest.approx(
            (2.4e12 + 1e12) / 2.4e12 + launches if ceiling == "device memory" else 1 + launches
        )
        stage = MACHINE.stage("it", work, 7)
        assert stage.seconds == pytest.approx(7 * (1 + launches)) and stage.ceiling == ceiling
    mixed = Work(operations={"bf16": 989e12 / 16, "fp8": 1979e12 / 16})
    assert MACHINE.seconds(mixed) == pytest.approx(1), "formats share the tensor cores"
    assert MACHINE.stage("it", Work(num_kernels=1), 1).ceiling == "launches"
    eager = replace(MACHINE, implementation=ORIGINAL)
    assert eager.seconds(Work(num_kernels=10)) == pytest.approx(10 * 9.6e-6 / 2)


def seconds_of(load: Load) -> dict[str, float]:
    return {stage.name: stage.seconds for stage in decode_stages(load, MACHINE)}


def test_values_of_whole_chunks_are_fetched_while_keys_are_rebuilt() -> None:
    whole = replace(LOAD, config=ShadowKVConfig(candidate_factor=1))
    works, stages = layer_operators(whole, FUSED), seconds_of(whole)
    both = MACHINE.seconds(works["rebuild_keys"] + works["fetch_values"])
    assert both < MACHINE.seconds(works["rebuild_keys"]) + MACHINE.seconds(works["fetch_values"])
    assert stages["rebuild_keys + fetch_values"] == pytest.approx(32 * both) and "fetch_values" not in stages
    chosen = seconds_of(LOAD)
    assert {"rebuild_keys", "choose_tokens", "fetch_values"} <= chosen.keys(), "logits come between them"
    assert list(chosen).index("rebuild_keys") < list(chosen).index("choose_tokens") < list(chosen).index("fetch_values")


def test_a_step_is_all_layers_and_the_head() -> None:
    works = layer_operators(LOAD, FUSED)
    expected = 32 * sum(MACHINE.seconds(work) for work in works.values())
    assert total_seconds(decode_stages(LOAD, MACHINE)) == pytest.approx(expected + seconds_of(LOAD)["head"])


def test_short_contexts_run_full_attention() -> None:
    short = replace(LOAD, num_prompt_tokens=900)
    assert seconds_of(short) == seconds_of(replace(short, config=None))
    assert "full_attention" in seconds_of(short)


def test_sliding_layers_attend_to_their_window() -> None:
    hybrid = replace(SHAPE, num_sliding_layers=24, sliding_window=1024)
    stages = seconds_of(replace(LOAD, shape=hybrid))
    window = MACHINE.seconds(Work(device_bytes=2 * 4 * 1024 * 2048, num_kernels=2))
    assert stages["sliding_attention"] == pytest.approx(24 * window)
    assert stages["score_chunks"] == pytest.approx(seconds_of(LOAD)["score_chunks"] / 4)


def test_a_cache_on_the_host_crosses_the_link_in_every_step() -> None:
    stages = seconds_of(replace(LOAD, config=None, offloaded=True))
    crossing = 4 * 65_600 * 4096 / (63e9 / 4)
    assert stages["full_attention"] == pytest.approx(32 * (crossing + 2 * 1.7e-6))


def test_prompts() -> None:
    machine = Machine(hardware=H200, efficiency=Efficiency(), implementation=FUSED)
    full = {stage.name: stage for stage in prefill_stages(SHAPE, None, 65_536, machine)}
    assert full["attention"].seconds == pytest.approx(32 * 2 * 65_536**2 * 4096 / 989e12, rel=1e-3)
    products = 2 * 65_536 * SHAPE.layer_weights / 989e12
    assert full["projections"].seconds == pytest.approx(32 * products, rel=1e-2)
    assert full["projections"].ceiling == full["attention"].ceiling == "tensor cores"
    ours = {stage.name: stage for stage in prefill_stages(SHAPE, ShadowKVConfig(), 65_536, machine)}
    assert ours.keys() - full.keys() == {"summarize_keys", "store_values"}
    assert ours["store_values"].seconds == pytest.approx(32 * 65_536 * 2048 / 63e9, rel=1e-2)
    chunked = prefill_stages(SHAPE, ShadowKVConfig(), 65_536, machine, prefill_chunk_size=8192)
    assert {stage.name for stage in chunked} - ours.keys() == {"parked keys and values"}
    assert len(prefill_stages(SHAPE, ShadowKVConfig(), 900, machine)) == 3, "short prompts are not compressed"


def test_parked_chunks_are_read_by_those_after_them_and_at_the_end() -> None:
    work = parked_history(SHAPE, ShadowKVConfig(), 20_000, 8192)
    read = 8192 + 16_384 + 16_384  # by the second chunk, by the third, at the end
    assert work.link_bytes == (read + 16_384) * 4096, "and written once"
    on_device = parked_history(SHAPE, ShadowKVConfig(value_store="device"), 20_000, 8192)
    assert on_device.link_bytes == 0 and on_device.device_bytes == work.link_bytes
