import asyncio
import os
import random
from typing import Any

import pytest
import torch

from longshadow import LLM, SamplingParams
from longshadow.engine.runtime import EngineClosed, RequestOutput, RequestTooLong
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
from tests.engine.shadowkv.families import tiny_model


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
    params = SamplingParams(n=3, seed=4, max_tokens=8, temperature=1)
    [output] = llm.generate(text(150), params)
    assert len({tuple(tokens) for tokens in tokens_of(output)}) == 3
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    [again] = llm.generate(text(150), params)
    assert tokens_of(again) == tokens_of(output)
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
    with pytest.raises(
        RequestTooLong, match=r"maximum context length is 4096 tokens. However, you requested 41\d\d tokens"
    ):
        llm.generate("a" * 100, SamplingParams(max_tokens=4000))
    with pytest.raises(RequestTooLong, match="the document has 4,2"):
        llm.add_document("a" * 4200)
    with pytest.raises(ValueError, match="n must be at most max_num_seqs = 4"):
        llm.generate("a", SamplingParams(n=5))
    for prompt in ([], [10**6], [-1]):
        with pytest.raises(ValueError, match="token"):
            llm.generate([prompt])
    assert_nothing_is_left(llm)


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
        ({"max_num_seqs": 0}, "max_num_seqs must be a whole number, at least 1"),
        ({"max_prefill_tokens": 63}, "max_prefill_tokens must be a whole number, at least 64"),
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


def test_a_forked_process_is_told_that_it_has_no_engine() -> None:
    with engine() as llm:
        llm.generate("abc", GREEDY)
        child = os.fork()
        if not child:
            try:
                llm.generate("abc", GREEDY)
            except EngineClosed as error:
                os._exit(0 if "forked" in str(error) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert llm.generate("abc", GREEDY)
