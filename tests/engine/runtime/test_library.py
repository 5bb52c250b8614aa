"""Documents are read once, held, shared by requests, and forgotten."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from longshadow import LLM, SamplingParams
from longshadow.engine.runtime import RequestTooLong
from tests.engine.runtime.engines import (
    GREEDY,
    assert_nothing_is_left,
    engine,
    last_of,
    peaked_model,
    small_config,
    text,
    tokens_of,
)


def test_a_document_answers_as_a_prompt_of_two_turns(llm: LLM) -> None:
    """The question attends to the compressed document exactly, as a later turn of a ShadowKVCache does."""
    from longshadow import ShadowKVCache

    document = llm.add_document(text(300))
    question = "what is kept?"
    found = llm.generate([question, question], GREEDY, document=document)
    assert [output.num_cached_tokens for output in found] == [document.num_tokens] * 2
    assert tokens_of(found[0]) == tokens_of(found[1])
    tokenizer: Any = llm.tokenizer
    # The markers of a chat's first message, as encode_document sets them.
    first = tokenizer("<user>" + text(300).strip(), add_special_tokens=False).input_ids
    assert len(first) == document.num_tokens
    model = peaked_model()
    with torch.inference_mode(), ShadowKVCache.for_model(model, small_config()) as cache:
        model(torch.tensor([first]), past_key_values=cache)
        tokens = tokenizer(question, add_special_tokens=False).input_ids
        ids = torch.tensor([tokens])
        expected = []
        for _ in range(GREEDY.max_tokens):
            expected.append(int(model(ids, past_key_values=cache).logits[0, -1].argmax()))
            ids = torch.tensor([expected[-1:]])
    assert tokens_of(found[0]) == [expected]
    llm.remove_document(document)
    with pytest.raises(ValueError, match="was removed"):
        llm.generate(question, document=document)
    assert llm.statistics().num_documents == 0
    assert_nothing_is_left(llm)


def test_a_document_of_another_engine_is_refused(llm: LLM) -> None:
    with engine() as other:
        document = other.add_document(text(100))
        with pytest.raises(ValueError, match="belongs to another engine"):
            llm.generate("so?", document=document)
    assert_nothing_is_left(llm)


def test_a_removed_document_stays_for_those_who_use_it(llm: LLM) -> None:
    document = llm.add_document(text(200))

    async def ask() -> list[int]:
        stream = llm.stream("so?", SamplingParams(max_tokens=30, temperature=0), document=document)
        return (await last_of(stream, lambda: llm.remove_document(document))).outputs[0].token_ids

    assert len(asyncio.run(ask())) == 30
    assert_nothing_is_left(llm)
    assert llm.statistics().num_documents == 0


def test_documents_that_take_the_memory_refuse_those_who_wait() -> None:
    """A request that waits for memory must not wait forever."""
    with engine(prefix_cache=False) as llm:
        inner = llm._engine
        prompt = "b" * 1500
        document_need = llm._accounting.need(1500, 0).prefill
        request_need = llm._accounting.need(1500, 11).prefill
        most = document_need.at_least(request_need)
        inner.budget.device_limit = inner.holdings.held.device + most.device + most.host + 1000
        failures: list[Exception] = []

        def ask() -> None:
            try:
                llm.generate(prompt, GREEDY)
            except Exception as error:
                failures.append(error)

        asking: list[threading.Thread] = []

        def begin(num_read: int, num_tokens: int) -> None:
            if num_read and not asking:
                asking.append(threading.Thread(target=ask))
                asking[0].start()

        document = llm.add_document("c" * 1493, on_progress=begin)
        asking[0].join(60)
        assert [type(failure) for failure in failures] == [RequestTooLong]
        llm.remove_document(document)
        assert_nothing_is_left(llm)


def test_progress_of_a_document_and_its_end_by_an_exception(llm: LLM) -> None:
    seen: list[tuple[int, int]] = []
    document = llm.add_document(text(400), on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (document.num_tokens, document.num_tokens)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    llm.remove_document(document)

    def refuse_from(least: int) -> Callable[[int, int], None]:
        def refuse(done: int, total: int) -> None:
            if done >= least:
                raise KeyError("enough")

        return refuse

    for least in (0, document.num_tokens):  # before anything has been read, and when all has been
        with pytest.raises(KeyError, match="enough"):
            llm.add_document(text(400), on_progress=refuse_from(least))
        assert_nothing_is_left(llm)
        assert llm.statistics().num_documents == 0
