"""Sizes that follow from a configuration, and refusals of what is out of range."""

from typing import Any

import pytest

from longshadow.engine.shadowkv import ShadowKVConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(budget_tokens=0), "budget_tokens must be at least 1"),
        (dict(budget_fraction=1.5), "budget_fraction must be above 0 and at most 1"),
        (dict(budget_tokens=5, budget_fraction=0.5), "not both"),
        (dict(rank=0), "rank must be at least 1"),
        (dict(rank=8, rank_energy=0.9), "not both"),
        (dict(rank_energy=0.0), "rank_energy must be above 0"),
        (dict(chunk_size=65), "chunk_size must be between 1 and 64"),
        (dict(local_tokens=0), "local_tokens must be at least 1"),
        (dict(candidate_factor=0.9), "candidate_factor must be at least 1"),
        (dict(candidate_factor=float("inf")), "candidate_factor must be at least 1"),
        (dict(resident_factor=0.5), "resident_factor must be 0 or at least 1"),
        (dict(key_store="low-rank"), "key_store must be one of 'low_rank', 'exact'"),
        (dict(value_dtype="int4"), "value_dtype must be one of None, 'int8'"),
        (dict(factor_dtype="fp16"), "factor_dtype must be one of None, 'int8', 'fp8'"),
        (dict(prefill_chunk_size=1), "prefill_chunk_size must be at least 2"),
    ],
)
def test_out_of_range_is_refused_with_the_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShadowKVConfig(**arguments)


def test_default_budget_is_the_larger_of_a_share_and_512_tokens() -> None:
    assert ShadowKVConfig().budget(8_000) == 512
    assert ShadowKVConfig().budget(131_072) == 2045
    assert ShadowKVConfig(budget_fraction=0.125).num_selected_chunks(4_000) == 63


def test_rank_beyond_the_key_width_is_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and KV heads x head_dim = 192"):
        ShadowKVConfig(rank=193).prompt_rank(192)


@pytest.mark.parametrize("width", [32, 192, 1024])
def test_generated_segments_cost_what_prompt_tokens_cost(width: int) -> None:
    config = ShadowKVConfig()
    tokens = config.generated_segment_tokens(width)
    rank = config.generated_rank(width, tokens)
    assert rank * (tokens + width) == pytest.approx(config.prompt_rank(width) * tokens, rel=0.06)


def test_a_budget_that_covers_the_context_runs_dense() -> None:
    assert ShadowKVConfig(budget_tokens=10_000).runs_dense(9_000)
    assert not ShadowKVConfig(budget_tokens=256).runs_dense(9_000)
    assert ShadowKVConfig().runs_dense(1_000)
    assert not ShadowKVConfig(dense_threshold=0).runs_dense(1)
