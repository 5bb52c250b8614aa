"""Streams, cancellation, and a queue that is full."""

import asyncio
import gc
import itertools
from typing import Any

import pytest
import torch

from longshadow import LLM, SamplingParams
from longshadow.engine.runtime import QueueFull, RequestOutput, RequestTooLong
from tests.engine.runtime.engines import GREEDY, assert_nothing_is_left, engine, last_of, text, tokens_of


def test_streams_grow_and_leaving_one_cancels_it(llm: LLM) -> None:
    async def leave() -> list[RequestOutput]:
        seen = []
        stream = llm.stream(text(100), SamplingParams(max_tokens=500, temperature=0), request_id="left")
        async for output in stream:
            seen.append(output)
            if len(seen) == 3:
                break
        await stream.aclose()
        return seen

    seen = asyncio.run(leave())
    for shorter, longer in itertools.pairwise(seen):
        assert longer.outputs[0].token_ids[: len(shorter.outputs[0].token_ids)] == shorter.outputs[0].token_ids
        assert longer.outputs[0].text.startswith(shorter.outputs[0].text)
        assert not longer.finished
    assert_nothing_is_left(llm)
    assert not llm.cancel("left")


def test_cancelling_delivers_what_there_is(llm: LLM) -> None:
    async def cancel() -> RequestOutput:
        stream = llm.stream("abc", SamplingParams(max_tokens=500, temperature=0), request_id="x")
        return await last_of(stream, lambda: llm.cancel("x"))

    output = asyncio.run(cancel())
    assert output.finished and output.outputs[0].finish_reason == "cancelled"
    assert 0 < len(output.outputs[0].token_ids) < 500
    assert_nothing_is_left(llm)


def test_a_stream_keeps_its_engine() -> None:
    stream = engine().stream("abc", GREEDY)
    gc.collect()
    assert asyncio.run(last_of(stream)).finished


def test_leaving_a_finished_stream_does_not_end_another_of_its_name(llm: LLM) -> None:
    async def ask() -> RequestOutput:
        first = llm.stream("abc", SamplingParams(max_tokens=1), request_id="name")
        async for output in first:
            assert output.finished
            break
        second = llm.stream("abc", SamplingParams(max_tokens=30, temperature=0), request_id="name")
        await anext(second)
        await first.aclose()
        return await last_of(second)

    assert len(asyncio.run(ask()).outputs[0].token_ids) == 30


def test_a_listener_whose_loop_is_closed_harms_nobody(llm: LLM) -> None:
    loop = asyncio.new_event_loop()
    stream = llm.stream("abc", SamplingParams(max_tokens=500, temperature=0), request_id="deaf")
    loop.run_until_complete(anext(stream))
    loop.close()
    assert len(tokens_of(llm.generate("abc", SamplingParams(max_tokens=5))[0])[0]) == 5
    assert llm.cancel("deaf")
    assert_nothing_is_left(llm)


def test_one_that_can_never_fit_is_refused_before_any_runs() -> None:
    with engine(max_num_waiting=1, prefix_cache=False) as llm:
        inner = llm._engine
        need = llm._accounting.need(400, 19).prefill
        inner.budget.device_limit = inner.holdings.held.device + need.device + need.host
        with pytest.raises(RequestTooLong, match="bytes of device"):
            llm.generate([text(20), text(30), text(3500)], GREEDY)
        assert llm.statistics().num_generated_tokens == 0


@pytest.mark.parametrize("prompts", [torch.tensor([[1, 2], [3, 4]]), {"a": 1}, None])
def test_prompts_are_texts_or_lists(llm: LLM, prompts: Any) -> None:
    with pytest.raises(ValueError, match="prompts must be texts or lists"):
        llm.generate(prompts)


def test_a_full_queue_says_so_and_generate_waits_for_it() -> None:
    with engine(max_num_waiting=2, max_num_seqs=1) as llm:
        prompts = [text(80, seed) for seed in range(8)]
        assert len(llm.generate(prompts, GREEDY)) == 8

        async def too_many() -> list[Any]:
            streams = [llm.stream(prompt, SamplingParams(max_tokens=50)) for prompt in prompts]
            return await asyncio.gather(*map(last_of, streams), return_exceptions=True)

        results = asyncio.run(too_many())
        full = [result for result in results if isinstance(result, QueueFull)]
        assert full and len(full) + sum(isinstance(result, RequestOutput) for result in results) == 8
        assert_nothing_is_left(llm)
