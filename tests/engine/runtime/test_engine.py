"""Memory decides who runs; an engine that is closed, fails or is dropped ends in order."""

import gc
import itertools
import threading
import time

import pytest

from longshadow import SamplingParams
from longshadow.engine.runtime import EngineClosed, RequestTooLong
from tests.engine.runtime.engines import GREEDY, assert_nothing_is_left, engine, text


def test_memory_admits_one_after_the_other_and_refuses_what_exceeds_it() -> None:
    with engine(prefix_cache=False) as llm:
        inner = llm._engine
        need = llm._accounting.need(400, 19).prefill
        # Room for one request.
        inner.budget.device_limit = inner.holdings.held.device + need.device + need.host
        params = SamplingParams(max_tokens=20, temperature=0)
        outputs = llm.generate([list(range(1, 200)) * 2 + [3, 4]] * 4, params)
        assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
        waits = sorted(output.metrics.queue_seconds or 0 for output in outputs)
        spans = sorted((o.metrics.arrival + (o.metrics.queue_seconds or 0), o.metrics.finished or 0) for o in outputs)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        assert waits[-1] > waits[0]
        with pytest.raises(RequestTooLong, match="bytes of device"):
            llm.generate("a" * 3000, SamplingParams(max_tokens=500))
        assert_nothing_is_left(llm)


def test_cached_heads_make_room_for_requests() -> None:
    with engine() as llm:
        inner = llm._engine
        llm.generate([text(600, seed) for seed in range(3)], GREEDY)
        assert inner.holdings.prefixes is not None and len(inner.holdings.prefixes) == 3
        need = llm._accounting.need(1000, 11).prefill
        inner.budget.device_limit = inner.holdings.held.device + need.device + need.host
        llm.generate("b" * 1000, GREEDY)
        assert len(inner.holdings.prefixes) <= 1
        assert_nothing_is_left(llm)


def test_closing_fails_every_open_request() -> None:
    llm = engine()
    failures: list[Exception] = []

    def ask() -> None:
        try:
            llm.generate([text(200, seed) for seed in range(6)], SamplingParams(max_tokens=2000))
        except EngineClosed as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not llm.statistics().num_running:
        time.sleep(0.01)
    llm.close()
    thread.join(60)
    assert [str(failure) for failure in failures] == ["the engine was closed"]
    with pytest.raises(EngineClosed):
        llm.generate("a")
    with pytest.raises(EngineClosed):
        llm.add_document("a")
    llm.close()
    assert llm._engine.budget.reserved == llm._engine.holdings.held
    assert llm.model.config._attn_implementation != "longshadow"


def test_an_engine_that_fails_says_why() -> None:
    with engine() as llm:
        llm._runner.read = lambda chunks: 1 // 0  # type: ignore[method-assign]
        with pytest.raises(EngineClosed, match="the engine failed: ZeroDivisionError"):
            llm.generate("abc")
        with pytest.raises(EngineClosed, match="ZeroDivisionError"):
            llm.generate("abc")


def test_an_engine_that_is_dropped_ends_its_thread() -> None:
    llm = engine()
    thread = llm._engine._thread
    del llm
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
