"""Prompts that share their segments are read together to what each gives alone."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.engine.shadowkv.segment import Segment
from longshadow.engine.shadowkv.sequence import Sequence
from longshadow.engine.shadowkv.shared_prompt import begin_together
from tests.engine.shadowkv.batches import Setting
from tests.engine.shadowkv.test_shared_decode import CONFIG, SETTINGS, forks


def compare(setting: Setting, sequences: list[Sequence], lengths: list[int]) -> int:
    """Checks prompts read together against each by itself; how many began together."""
    num_heads, num_query_heads = setting.num_kv_heads, setting.num_kv_heads * setting.num_groups
    prompts = [
        (
            setting.random(num_query_heads, length, setting.key_dim),
            setting.random(num_heads, length, setting.key_dim),
            setting.random(num_heads, length, setting.value_dim),
        )
        for length in lengths
    ]
    begun = begin_together(sequences, [query for query, _, _ in prompts], setting.value_dim, setting.parameters)
    for sequence, prompt, online in zip(sequences, prompts, begun, strict=True):
        alone = sequence.copy()
        expected = alone.attend_prompt(*prompt, setting.parameters)
        actual = sequence.attend_prompt(*prompt, setting.parameters, begun=online)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        assert sequence.query_energy.tensors[0].equal(alone.query_energy.tensors[0])
    return sum(online is not None for online in begun)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("turns", [[300], [200, 150]], ids=["one segment", "two segments"])
def test_questions_on_a_document(case: str, turns: list[int]) -> None:
    setting = Setting(**{"config": CONFIG, **SETTINGS[case]})
    assert compare(setting, forks(setting, turns, [3, 9, 1]), [4, 1, 30]) == 3


def test_only_those_that_share_begin_together() -> None:
    setting = Setting(config=CONFIG)
    first, second, third = (forks(setting, turns, [2, 5]) for turns in ([300], [300], [8]))
    assert compare(setting, [first[0], second[0], third[0], third[1], first[1]], [3, 7, 2, 4, 1]) == 2


def test_keys_are_rebuilt_once_for_all() -> None:
    setting = Setting(config=CONFIG)
    sequences = forks(setting, [300], [2, 5, 1])
    queries = [setting.random(setting.num_kv_heads * setting.num_groups, 3, setting.key_dim) for _ in sequences]
    with mock.patch.object(Segment, "span", autospec=True, side_effect=Segment.span) as span:
        begin_together(sequences, queries, setting.value_dim, setting.parameters)
    assert span.call_count == 1


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    turns=st.lists(st.integers(20, 200), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    case=st.sampled_from(sorted(SETTINGS)),
)
def test_any_mixture(seed: int, turns: list[int], lengths: list[int], case: str) -> None:
    setting = Setting(**{"config": CONFIG, "seed": seed, **SETTINGS[case]})
    sequences = forks(setting, turns, [1] * len(lengths)) + forks(setting, turns[::-1], [5, 2])
    compare(setting, sequences, [*lengths, 1, 8])
