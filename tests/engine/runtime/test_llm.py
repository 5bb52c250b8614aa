import asyncio
import gc
import itertools
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
import torch

from longshadow import LLM, SamplingParams
from longshadow.engine.runtime import EngineClosed, EngineStatistics, QueueFull, RequestOutput, RequestTooLong
from tests.engine.runtime.engines import engine, peaked_model, small_config
from tests.engine.shadowkv.families import tiny_model

GREEDY = SamplingParams(max_tokens=12, temperature=0)
WORDS = "the cache keeps what the next step needs and forgets all else, ".split(" ")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with engine() as opened:
        yield opened


def text(length: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(length))[:length]


def tokens_of(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


async def last_of(
    stream: AsyncGenerator[RequestOutput, None], on_output: Callable[[], object] = lambda: None
) -> RequestOutput:
    outputs = []
    async for output in stream:
        outputs.append(output)
        on_output()
    return outputs[-1]


def free_of_requests(statistics: EngineStatistics) -> bool:
    return statistics.num_running == statistics.num_waiting == 0


def assert_nothing_is_left(llm: LLM) -> None:
    """No slot, byte or task of any request: only the engine's own part, documents and cached heads are reserved."""
    deadline = time.monotonic() + 60
    while not free_of_requests(llm.statistics()) and time.monotonic() < deadline:
        time.sleep(0.01)
    inner = llm._engine
    assert free_of_requests(llm.statistics())
    assert inner.scheduler.num_free_slots == llm.max_num_seqs
    assert inner._requests == {}
    cached = inner.holdings.prefixes.bytes if inner.holdings.prefixes is not None else type(inner.holdings.held)()
    assert inner.budget.reserved == inner.holdings.held + cached
    assert all(document.num_users == 0 for document in inner.holdings.documents.values())


def test_32_requests_that_come_and_go_give_what_each_gives_alone() -> None:
    """Random lengths, arrivals, parameters, stops and cancellations; fp64, so the tokens are identical."""
    rng = random.Random(1)
    prompts = [text(rng.choice((5, 40, 90, 200, 350)), seed=index % 20) for index in range(32)]
    params = [
        SamplingParams(
            max_tokens=rng.randint(1, 20),
            n=rng.choice((1, 1, 1, 2)),
            temperature=rng.choice((0.0, 1.0)),
            top_p=rng.choice((1.0, 0.9)),
            presence_penalty=rng.choice((0.0, 0.5)),
            seed=index,
            stop=rng.choice(((), ("e",), ("needs", "a"))),
        )
        for index in range(32)
    ]
    cancelled = set(rng.sample(range(32), 6))
    # Nothing in common with the engine under test: no batch, no prefix cache, prompts in one piece.
    with engine(max_num_seqs=2, max_prefill_tokens=1024, prefix_cache=False) as alone:
        expected = [alone.generate(prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]
        assert_nothing_is_left(alone)

    async def ask(llm: LLM, index: int) -> RequestOutput:
        await asyncio.sleep(rng.random() * 0.3)
        stream = llm.stream(prompts[index], params[index], request_id=str(index))
        output = await last_of(stream, lambda: index in cancelled and llm.cancel(str(index)))
        assert output.finished
        return output

    async def all_at_once(llm: LLM) -> list[RequestOutput]:
        return await asyncio.gather(*(ask(llm, index) for index in range(32)))

    with engine() as llm:
        found = asyncio.run(all_at_once(llm))
        assert llm.statistics().prefix_cache_hits > 0
        assert_nothing_is_left(llm)
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        if index in cancelled:
            for whole, begun in zip(tokens_of(one), tokens_of(other), strict=True):
                assert whole[: len(begun)] == begun
        else:
            assert tokens_of(one) == tokens_of(other)
            assert [completion.text for completion in one.outputs] == [completion.text for completion in other.outputs]


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2"])
def test_hybrid_models_and_the_prefix_cache(family: str) -> None:
    """A second prompt that begins alike goes on from the first one's tokens, windows and query energies."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randint(1, 128, (200,), generator=generator).tolist()
    prompts = [head + torch.randint(1, 128, (length,), generator=generator).tolist() for length in (60, 20, 90)]
    answers = []
    for prefix_cache in (True, False):
        with LLM(
            tiny_model(family).double(),
            shadowkv=small_config(rank=16),
            max_prefill_tokens=64,
            prefix_cache=prefix_cache,
            device_memory="1G",
        ) as llm:
            outputs = [llm.generate([prompt], GREEDY)[0] for prompt in prompts]
            answers.append([tokens_of(output) for output in outputs])
            if prefix_cache:
                assert [output.num_cached_tokens for output in outputs] == [0, 192, 192]
            assert_nothing_is_left(llm)
    assert answers[0] == answers[1]


def test_prompts_that_come_together_share_their_head(llm: LLM) -> None:
    """Those behind wait until the first has been read."""
    head = text(500, seed=77)
    prompts = [head + end for end in ("one", "two and more", "three")]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.num_cached_tokens for output in outputs] == [0, 448, 448]
    with engine(prefix_cache=False) as alone:
        assert [tokens_of(output) for output in outputs] == [tokens_of(*alone.generate(p, GREEDY)) for p in prompts]
    assert_nothing_is_left(llm)


def test_completions_of_one_prompt_share_it_and_differ(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=4, max_tokens=8)
    [output] = llm.generate(text(150), params)
    assert len({tuple(tokens) for tokens in tokens_of(output)}) == 3
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    [again] = llm.generate(text(150), params)
    assert tokens_of(again) == tokens_of(output)
    assert_nothing_is_left(llm)


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


def test_a_removed_document_stays_for_those_who_use_it(llm: LLM) -> None:
    document = llm.add_document(text(200))

    async def ask() -> list[int]:
        stream = llm.stream("so?", SamplingParams(max_tokens=30, temperature=0), document=document)
        return (await last_of(stream, lambda: llm.remove_document(document))).outputs[0].token_ids

    assert len(asyncio.run(ask())) == 30
    assert_nothing_is_left(llm)
    assert llm.statistics().num_documents == 0


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


def test_stops_and_log_probabilities(llm: LLM) -> None:
    [whole] = llm.generate("abc", SamplingParams(max_tokens=10, temperature=0, logprobs=2))
    tokens = whole.outputs[0].token_ids
    assert whole.outputs[0].logprobs is not None
    assert [entry.token_id for entry in whole.outputs[0].logprobs] == tokens
    assert all(entry.rank == 1 and entry.top[0][0] == entry.token_id for entry in whole.outputs[0].logprobs)
    last = next(index for index, token in enumerate(tokens) if token == tokens[-1])
    [stopped] = llm.generate(
        "abc", SamplingParams(max_tokens=10, temperature=0, stop_token_ids=(tokens[-1],), ignore_eos=True)
    )
    completion = stopped.outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", tokens[-1])
    assert completion.token_ids == tokens[: last + 1]
    [late] = llm.generate(
        "abc", SamplingParams(max_tokens=10, temperature=0, stop_token_ids=(tokens[0],), min_tokens=3)
    )
    assert len(late.outputs[0].token_ids) >= 3


def test_end_tokens_end_an_answer_unless_ignored() -> None:
    model = peaked_model()
    with engine(model=model) as llm:
        [first] = llm.generate("abc", GREEDY)
    model = peaked_model()
    model.generation_config.eos_token_id = first.outputs[0].token_ids[2]
    with engine(model=model) as llm:
        [ended] = llm.generate("abc", GREEDY)
        assert ended.outputs[0].finish_reason == "stop" and ended.outputs[0].stop_reason is None
        assert len(ended.outputs[0].token_ids) <= 3
        [ignored] = llm.generate("abc", SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
        assert ignored.outputs[0].token_ids == first.outputs[0].token_ids


def test_what_can_never_fit_is_refused_at_once(llm: LLM) -> None:
    with pytest.raises(RequestTooLong, match=r"make 4,1\d\d, but 4,096 fit"):
        llm.generate("a" * 100, SamplingParams(max_tokens=4000))
    with pytest.raises(RequestTooLong, match="the document has 4,2"):
        llm.add_document("a" * 4200)
    with pytest.raises(ValueError, match="n must be at most max_num_seqs = 4"):
        llm.generate("a", SamplingParams(n=5))
    for prompt in ([], [10**6], [-1]):
        with pytest.raises(ValueError, match="token"):
            llm.generate([prompt])
    assert_nothing_is_left(llm)


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


def test_without_a_tokenizer_prompts_are_ids_and_answers_have_no_text() -> None:
    with LLM(peaked_model(), shadowkv=small_config(), device_memory="1G") as llm:
        [output] = llm.generate([5, 6, 7], GREEDY)
        assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 12
        with pytest.raises(ValueError, match="has no tokenizer"):
            llm.generate("abc")
        with pytest.raises(ValueError, match="has no tokenizer"):
            llm.generate([5], SamplingParams(stop="a"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"max_prefill_tokens": 63}, "max_prefill_tokens must be at least 64"),
        ({"max_model_len": 5000}, "max_model_len must be at most 4096"),
        ({"device_memory": "lots"}, "device_memory must be"),
        ({"device_memory": 1000}, "device_memory leaves 1,000 bytes"),
        ({"shadowkv": small_config(rank=1000)}, "rank must be between"),
    ],
)
def test_impossible_engines_are_refused(changes: dict[str, Any], message: str) -> None:
    model = peaked_model()
    with pytest.raises(ValueError, match=message):
        engine(model=model, **changes)
    assert model.config._attn_implementation != "longshadow"
