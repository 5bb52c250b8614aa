"""Faults everywhere in the engine's loop: one request's failure is that request's, or the engine ends loudly."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from longshadow import LLM, SamplingParams
from longshadow.engine.runtime import EngineDead, RequestFailed, RequestOutput, outcomes
from longshadow.engine.runtime.sampling import Sampler
from longshadow.env import BACKEND_VARIABLE
from tests.engine.runtime.engines import GREEDY, assert_nothing_is_left, engine, last_of, small_config, text, tokens_of
from tests.tiny_models import tiny_tokenizer

BAD = "POISON " + text(300, seed=50)
GOOD = [text(300, seed) for seed in range(3)]
MARK = tiny_tokenizer().convert_tokens_to_ids("P")


class Fault(RuntimeError):
    pass


@pytest.fixture(scope="module")
def expected() -> list[list[list[int]]]:
    with engine(prefix_cache=False) as llm:
        return [tokens_of(output) for output in llm.generate(GOOD, GREEDY)]


@pytest.fixture
def fresh() -> Iterator[LLM]:
    with engine(prefix_cache=False) as llm:
        yield llm


def ask_all(llm: LLM, prompts: list[Any], params: SamplingParams = GREEDY) -> list[RequestOutput | BaseException]:
    async def ask() -> list[RequestOutput | BaseException]:
        return await asyncio.gather(*(last_of(llm.stream(one, params)) for one in prompts), return_exceptions=True)

    return asyncio.run(ask())


def assert_only_the_bad_one_fails(llm: LLM, expected: list[list[list[int]]], log: pytest.LogCaptureFixture) -> None:
    """Asked together with good ones, which get the answers that they get without it."""
    log.clear()
    found = ask_all(llm, [GOOD[0], BAD, *GOOD[1:]])
    failure = found.pop(1)
    assert isinstance(failure, RequestFailed) and "poison" not in str(failure)
    assert isinstance(failure.__cause__, Exception) and "poison" in str(failure.__cause__)
    assert [tokens_of(output) for output in found if isinstance(output, RequestOutput)] == expected
    assert any(record.exc_info and "poison" in str(record.exc_info[1]) for record in log.records)
    assert not llm.is_closed and llm.statistics().num_failed == 1
    [again] = llm.generate(GOOD[0], GREEDY)
    assert tokens_of(again) == expected[0]
    assert_nothing_is_left(llm)


def test_in_the_prefill_of_one(fresh: LLM, expected: Any, caplog: pytest.LogCaptureFixture) -> None:
    read = fresh._runner.read

    def faulty(chunks: Any) -> torch.Tensor:
        logits = read(chunks)  # its states have got the tokens by then
        if any(MARK in chunk.tokens for chunk in chunks):
            raise Fault("poison")
        return logits

    fresh._runner.read = faulty  # type: ignore[method-assign]
    assert_only_the_bad_one_fails(fresh, expected, caplog)


@pytest.mark.parametrize("layer", [0, 1])
def test_in_a_layer_of_a_decoding_step(fresh: LLM, expected: Any, caplog: pytest.LogCaptureFixture, layer: int) -> None:
    """Some layers hold the step's token by then, others do not."""
    work, poisoned = fresh._runner._work, set()
    begin = fresh._engine._outcomes._start_decoding

    def note(job: Any, logits: torch.Tensor) -> None:
        begin(job, logits)
        if MARK in job.prompt:
            poisoned.update(id(completion.state) for completion in job.completions)

    def fault(*_: Any) -> None:
        if any(id(state) in poisoned for state in work.decoding):
            raise Fault("poison")

    fresh._engine._outcomes._start_decoding = note  # type: ignore[method-assign]
    handle = fresh.model.model.layers[layer].mlp.register_forward_hook(fault)
    try:
        assert_only_the_bad_one_fails(fresh, expected, caplog)
    finally:
        handle.remove()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_step_that_fails_once_harms_nobody_who_can_go_on(
    backend: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether sequences decode one by one, or by operators as a batch; some of them are compressed on the way."""
    monkeypatch.setenv(BACKEND_VARIABLE, backend)
    with engine(prefix_cache=False, shadowkv=small_config(local_tokens=8)) as llm:
        params = SamplingParams(max_tokens=90, temperature=0)
        undisturbed = [tokens_of(output) for output in llm.generate(GOOD, params)]
        calls = 0

        def fault(*_: Any) -> None:
            nonlocal calls
            if len(llm._runner._work.decoding) > 1:
                calls += 1
                if calls % 5 == 0:
                    raise torch.OutOfMemoryError("CUDA out of memory")

        handle = llm.model.model.layers[0].mlp.register_forward_hook(fault)
        outputs = llm.generate(GOOD, params)
        handle.remove()
        assert calls > 60 and [tokens_of(output) for output in outputs] == undisturbed
        assert llm.statistics().num_failed == 0
        assert sum("each goes on alone" in record.getMessage() for record in caplog.records) == calls // 5


def test_in_the_sampling_of_one(
    fresh: LLM, expected: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = outcomes.choose_tokens.__globals__["_choose"]

    def faulty(logits: torch.Tensor, samplers: list[Sampler], uniforms: Any) -> list[int]:
        if any(MARK in sampler.tokens and len(sampler.tokens) > len(BAD) + 2 for sampler in samplers):
            raise Fault("poison")
        chosen: list[int] = ids(logits, samplers, uniforms)
        return chosen

    monkeypatch.setitem(outcomes.choose_tokens.__globals__, "_choose", faulty)
    assert_only_the_bad_one_fails(fresh, expected, caplog)


def test_in_the_text_of_one(fresh: LLM, expected: Any, caplog: pytest.LogCaptureFixture) -> None:
    begin = fresh._engine._outcomes._start_decoding

    def faulty(job: Any, logits: torch.Tensor) -> None:
        if MARK in job.prompt:
            job.completions[0].text.add = fail
        begin(job, logits)

    def fail(*_: Any, **__: Any) -> None:
        raise Fault("poison")

    fresh._engine._outcomes._start_decoding = faulty  # type: ignore[method-assign]
    assert_only_the_bad_one_fails(fresh, expected, caplog)


def test_at_the_start_of_one(fresh: LLM, expected: Any, caplog: pytest.LogCaptureFixture) -> None:
    begin = fresh._engine._starts.begin

    def faulty(job: Any) -> None:
        begin(job)
        if MARK in job.prompt:
            raise Fault("poison")

    fresh._engine._starts.begin = faulty  # type: ignore[method-assign]
    assert_only_the_bad_one_fails(fresh, expected, caplog)


def test_in_a_listener(fresh: LLM, expected: Any) -> None:
    def deaf(item: object) -> None:
        raise Fault("nobody listens")

    request = fresh._intake.request(BAD, GREEDY, None, deaf)
    fresh._engine.submit(request)
    assert [tokens_of(output) for output in fresh.generate(GOOD, GREEDY)] == expected
    assert_nothing_is_left(fresh)


def test_in_tokenising_one(fresh: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It happens where the request is made, not in the engine's thread."""
    with monkeypatch.context() as patch:
        patch.setattr(type(fresh.tokenizer), "__call__", lambda *_, **__: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            fresh.generate("abc", GREEDY)
    assert fresh.generate("abc", GREEDY)[0].finished
    assert_nothing_is_left(fresh)


@pytest.mark.parametrize("where", ["read", "build"])
def test_in_a_document(fresh: LLM, expected: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise Fault("poison")

    with monkeypatch.context() as patch:
        if where == "build":
            patch.setattr(fresh._library, "_document", fail)
        else:
            read = fresh._runner.read
            patch.setattr(
                fresh._runner, "read", lambda chunks: fail() if any(MARK in c.tokens for c in chunks) else read(chunks)
            )
        answers: list[Any] = []
        others = threading.Thread(target=lambda: answers.extend(fresh.generate(GOOD, GREEDY)))
        others.start()
        with pytest.raises(RequestFailed, match="its log says why"):
            fresh.add_document(BAD)
        others.join()
    assert [tokens_of(output) for output in answers] == expected
    assert fresh.add_document(BAD).num_tokens > len(BAD)
    assert_nothing_is_left(fresh)


@pytest.mark.parametrize("where", ["read", "decode"])
def test_in_every_step(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """An engine that cannot go on says so, to all who wait and to all who come."""
    with engine() as llm:

        def fail(*_: Any) -> None:
            raise Fault("device-side assert")

        setattr(llm._runner, where, fail)
        found = ask_all(llm, GOOD)
        assert all(isinstance(one, EngineDead) and "Fault: device-side assert" in str(one) for one in found)
        assert llm.is_closed and llm.has_failed
        with pytest.raises(EngineDead, match="Fault: device-side assert"):
            llm.generate(GOOD[0])
        with pytest.raises(EngineDead):
            llm.add_document(GOOD[0])
        llm.close()
        [record] = [record for record in caplog.records if record.levelno == logging.CRITICAL]
        assert record.exc_info is not None and isinstance(record.exc_info[1], Fault)
    assert llm.model.config._attn_implementation != "longshadow"


def test_in_every_step_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is for requests alone, so that only they tell."""
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")

    def fail(*_: Any) -> None:
        raise Fault("device-side assert")

    with engine() as llm:
        llm._runner.decode = fail  # type: ignore[method-assign, assignment]
        kinds = [type(ask_all(llm, GOOD[:1])[0]) for _ in range(4)]
        assert kinds == [RequestFailed, RequestFailed, EngineDead, EngineDead] and llm.has_failed


def test_in_the_loop_itself(caplog: pytest.LogCaptureFixture) -> None:
    with engine() as llm:
        llm._engine.scheduler.plan = None  # type: ignore[method-assign, assignment]
        found = ask_all(llm, GOOD)
        assert all(isinstance(one, EngineDead) for one in found) and llm.has_failed


def test_a_closed_engine_has_not_failed() -> None:
    llm = engine()
    llm.close()
    assert llm.is_closed and not llm.has_failed
