"""Streams, cancellation, and a queue that is full."""

import asyncio
import gc
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from longshadow import LLM, SamplingParams
from longshadow.engine.runtime import QueueFull, RequestOutput
from tests.engine.runtime.engines import GREEDY, assert_nothing_is_left, engine, last_of, text


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with engine() as opened:
        yield opened


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
