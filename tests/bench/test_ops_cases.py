"""The operators' benchmark cases: inputs that operators take, floors that follow from them, checks that can fail."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from bench.ops import (
    fetch_values,
    plan_chunks,
    rebuild_keys,
    score_chunks,
    score_tokens,
    sparse_attention,
    summarize_keys,
    top_chunks,
)
from bench.ops.case import Case, Work
from longshadow.engine.ops.backend import Operators, operators

CPU = torch.device("cpu")
DECODING = (score_chunks, top_chunks, plan_chunks, rebuild_keys, score_tokens, fetch_values, sparse_attention)
MODULES = (*DECODING, summarize_keys)
# Weights sum to 1: what a wrong operator writes must differ by more than the tolerance.
WRITTEN = {
    "score_chunks": -2,
    "top_chunks": -1,
    "plan_chunks": -3,
    "score_tokens": -2,
    "sparse_attention": -3,
    "rebuild_keys": -2,
    "fetch_values": -1,
    "summarize_keys": -3,
}


def small(case: Case, **changes: Any) -> Case:
    return replace(case, **(dict(context_tokens=2048, tail_tokens=70, working_set=0) | changes))


def name_of(module: ModuleType) -> str:
    return module.__name__.rsplit(".", 1)[1]


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_every_case_runs_and_its_check_can_fail(module: ModuleType) -> None:
    reference = operators(CPU, "reference")
    name = name_of(module)
    right = getattr(reference, name)

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        written = arguments[WRITTEN[name]]
        written.mul_(1.1) if written.is_floating_point() else written.add_(1)

    for case in module.cases():
        if case.batch_size == 1:
            work: Work = module.make(small(case), CPU, seed=0)
            work.run(reference)
            assert work.check(reference).passed
            broken: Operators = replace(reference, **{name: wrong})
            assert not work.check(broken).passed


@pytest.mark.parametrize("module", DECODING, ids=name_of)
def test_cases_are_of_one_model_at_several_batch_sizes(module: ModuleType) -> None:
    cases = module.cases()
    assert {case.batch_size for case in cases} == {1, 8, 24}
    assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_runs_read_the_working_set_in_several_layers(module: ModuleType) -> None:
    [case, *_] = module.cases()
    one = module.make(small(case), CPU, seed=0)
    assert one.num_layers == 1
    several = module.make(small(case, working_set=3 * one.num_bytes - 1), CPU, seed=0)
    assert several.num_layers == 3 and several.num_bytes == 3 * one.num_bytes and several.flops == 3 * one.flops


def test_floor_of_score_chunks_is_its_landmarks() -> None:
    works = [score_chunks.make(small(case), CPU, seed=0) for case in score_chunks.cases() if case.batch_size == 1]
    num_vectors = 8 * 2048 // 8
    # A landmark, its scale where it has one, and its score.
    assert [work.num_bytes // num_vectors for work in works] == [256 + 4, 128 + 4 + 4, 128 + 4 + 4]


def test_floors_of_rebuilding_and_fetching_are_the_missing_tokens() -> None:
    [case, *_] = rebuild_keys.cases()
    work = rebuild_keys.make(small(case), CPU, seed=0)
    missing = round(0.4 * small(case).num_candidates)
    rows = round(256 * (1 - (1 - missing / 256) ** 8)) * 8
    assert work.num_bytes == rows * (320 + 256) + 8 * missing * 8 * 256 + 8 * 160 * 256
    works = [fetch_values.make(small(case), CPU, seed=0) for case in fetch_values.cases() if case.batch_size == 1]
    num_missing = 8 * round(0.4 * small(fetch_values.cases()[0]).num_selected * 8)
    assert [work.num_bytes // num_missing for work in works] == [256, 128 + 4, 512, 128 + 4 + 256]


def test_floor_of_the_summary_is_keys_read_and_written() -> None:
    work = summarize_keys.make(small(summarize_keys.cases()[0]), CPU, seed=0)
    assert work.flops == 2048 * 1024 * 1025
    assert work.num_bytes == 2048 * (2 * 2048 + 256) + 8 * 256 * 129 * 4 + 8 * 1024**2
