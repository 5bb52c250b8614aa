"""Sequences that share their segments decode together to what each gives alone."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.engine.shadowkv import ShadowKVConfig, shared_decode
from longshadow.engine.shadowkv.decode import StepCounts
from longshadow.engine.shadowkv.sequence import Sequence
from longshadow.engine.shadowkv.shared_decode import attend_tokens
from tests.engine.shadowkv.batches import Setting

CONFIG = ShadowKVConfig(
    rank=8, budget_tokens=32, local_tokens=16, num_sink_chunks=1, num_outlier_chunks=2, dense_threshold=0
)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sinks": {"has_sinks": True},
    "one candidate": {"config": replace(CONFIG, candidate_factor=1.0)},
    "exact keys": {"config": replace(CONFIG, key_store="exact"), "layout": None},
    "no exact chunks": {"config": replace(CONFIG, num_sink_chunks=0, num_outlier_chunks=0)},
    "wide values": {"value_dim": 24},
}


def forks(setting: Setting, turns: list[int], questions: list[int]) -> list[Sequence]:
    """Copies of one document, each with a question of its own."""
    [document] = setting.sequences([turns])[0]
    sequences = [document.copy() for _ in questions]
    for sequence, length in zip(sequences, questions, strict=True):
        keys, values = (
            setting.random(setting.num_kv_heads, length, width) for width in (setting.key_dim, setting.value_dim)
        )
        sequence.append(keys, values, setting.rotations(0, 0))
    return sequences


def compare(setting: Setting, sequences: list[Sequence]) -> int:
    """Checks a step of all against each one's own; how often several were attended to together."""
    alone = [sequence.copy() for sequence in sequences]
    for sequence in [*alone, *sequences]:
        sequence.counts = StepCounts()
    query = setting.new_tokens(len(sequences))[0]
    expected = torch.stack([it.attend_token(one, setting.parameters) for it, one in zip(alone, query, strict=True)])
    with mock.patch.object(shared_decode, "_attend_together", wraps=shared_decode._attend_together) as together:
        actual = attend_tokens(sequences, query, setting.parameters)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert [it.counts for it in sequences] == [it.counts for it in alone]
    return together.call_count


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("turns", [[300], [200, 150]], ids=["one segment", "two segments"])
@pytest.mark.parametrize("least_shared", [1, 10**9], ids=["union", "own"])
def test_questions_on_a_document(case: str, turns: list[int], least_shared: int, monkeypatch) -> None:
    monkeypatch.setattr(shared_decode, "LEAST_SHARED", least_shared)
    setting = Setting(**{"config": CONFIG, **SETTINGS[case]})
    sequences = forks(setting, turns, [3, 9, 1, 9])
    assert compare(setting, sequences) == 1


def test_only_those_that_share_go_together() -> None:
    setting = Setting(config=CONFIG)
    first, second, third = (forks(setting, turns, [2, 5]) for turns in ([300], [300], [8]))
    assert compare(setting, [first[0], second[0], third[0], second[1], first[1], third[1]]) == 2
    assert compare(setting, [first[0], second[0]]) == 0


def test_a_part_takes_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(config=CONFIG)
    sequences = forks(setting, [300], [1, 2, 3, 4, 5])
    keys = sequences[0].tail.keys
    rebuilt = round(CONFIG.candidate_factor * CONFIG.budget_tokens) * keys[:, :1].numel() * keys.itemsize
    monkeypatch.setattr(shared_decode, "LARGEST_PART", 2 * rebuilt)
    assert compare(setting, sequences) == 2  # two, two, and one by itself
    monkeypatch.setattr(shared_decode, "LARGEST_PART", 1)
    assert compare(setting, sequences) == 0


def test_logits_of_many_queries_and_many_keys_are_bounded() -> None:
    sequences = forks(Setting(config=CONFIG), [300], [1] * 5)
    sizes = shared_decode._common_sizes(sequences, torch.device("cpu"))
    assert sizes is not None
    most = shared_decode.LARGEST_PART * shared_decode.LEAST_SHARED
    num_heads = most // (9 * 4 * sizes.num_candidates * CONFIG.chunk_size)  # three by three
    parts = shared_decode._in_parts([*range(5)], sequences, sizes, num_heads)
    assert parts == [[0, 1, 2], [3, 4]]


def test_chunks_that_stay_resident_are_each_sequences_own() -> None:
    setting = Setting(config=replace(CONFIG, resident_factor=2.0))
    assert compare(setting, forks(setting, [300], [3, 4])) == 0


def test_a_chunk_is_rebuilt_once_for_all_that_want_it() -> None:
    setting = Setting(config=CONFIG)
    sequences = forks(setting, [300], [4, 4])
    query = setting.new_tokens(1)[0].repeat(2, 1, 1)  # both want the same
    with mock.patch.object(shared_decode, "gather_keys", wraps=shared_decode.gather_keys) as gather:
        attend_tokens(sequences, query, setting.parameters)
    [(_, chunks)] = [call.args for call in gather.call_args_list]
    num_candidates = round(CONFIG.candidate_factor * CONFIG.num_selected_chunks(304))
    assert chunks.shape == (setting.num_kv_heads, num_candidates)
    assert all(len(head.unique()) == num_candidates for head in chunks)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    turns=st.lists(st.integers(20, 200), min_size=1, max_size=3),
    questions=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    case=st.sampled_from(sorted(SETTINGS)),
)
def test_any_mixture(seed: int, turns: list[int], questions: list[int], case: str) -> None:
    setting = Setting(**{"config": CONFIG, "seed": seed, **SETTINGS[case]})
    sequences = forks(setting, turns, questions) + forks(setting, turns[::-1], questions[:2])
    for _ in range(3):
        compare(setting, sequences)
        for sequence in sequences:
            new = (setting.random(setting.num_kv_heads, 1, width) for width in (setting.key_dim, setting.value_dim))
            sequence.append(*new, setting.rotations(0, 0))
