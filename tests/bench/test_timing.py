"""Interleaved timing."""

import pytest

from bench.timing import Candidate, Timing, paired_speedup, rates, time_interleaved


def test_candidates_take_turns_and_preparation_is_not_timed():
    calls = []
    candidates = {
        name: Candidate(
            run=lambda name=name: calls.append(name),
            prepare=lambda name=name: calls.append(f"prepare {name}"),
        )
        for name in "ab"
    }
    timings = time_interleaved(candidates, repeats=2, warmup=1)
    assert calls == ["prepare a", "a", "prepare b", "b"] * 3
    assert [len(timings[name].seconds) for name in "ab"] == [2, 2]


def test_percentiles():
    timing = Timing(seconds=tuple(range(101)))
    assert (timing.p20, timing.median, timing.p80) == (20, 50, 80)
    single = Timing(seconds=(0.5,))
    assert single.row() == {"median": 0.5, "p20": 0.5, "p80": 0.5}


def test_speedup_is_paired_within_rounds():
    # The machine slows down eightfold after the second round; the ratio within each round does not move.
    baseline, candidate = Timing(seconds=(4.0, 4.0, 32.0)), Timing(seconds=(2.0, 2.0, 16.0))
    assert paired_speedup(baseline, candidate) == 2.0


def test_rates():
    row = rates(Timing(seconds=(2.0,)), num_bytes=10, flops=100)
    assert row == {"bytes": 10, "bytes_per_s": 5.0, "flops": 100, "flops_per_s": pytest.approx(50.0)}
