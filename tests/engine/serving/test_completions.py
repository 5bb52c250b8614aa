"""The official client against the tiny model: whole answers and streams say what the engine says."""

import openai
import pytest

from longshadow import SamplingParams

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the thing?"}]
PROMPT = "the other thing"


@pytest.fixture(scope="module")
def client(server):
    return server.openai()


def expected(llm, prompt, document=None, **params):
    """What the engine itself answers."""
    [output] = llm.generate([prompt], SamplingParams(temperature=0.0, **params), document=document)
    return output


def test_models(client, llm):
    [model] = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert model.max_model_len == llm.max_model_len
    assert client.models.retrieve("tiny") == model


def test_chat(client, llm):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=20)
    prompt = llm.chat_prompt(MESSAGES)
    output = expected(llm, prompt, max_tokens=20)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", output.outputs[0].text)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert answer.object == "chat.completion" and answer.model == "tiny"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == len(prompt) + 20
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_streamed_chat(client, llm):
    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        temperature=0,
        max_completion_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert {chunk.id for chunk in chunks} == {last.id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected(llm, llm.chat_prompt(MESSAGES), max_tokens=20).outputs[0].text
    assert last.choices == [] and last.usage.completion_tokens == 20


def test_completion(client, llm):
    answer = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=12)
    output = expected(llm, PROMPT, max_tokens=12)
    assert answer.choices[0].text == output.outputs[0].text
    assert answer.object == "text_completion"
    assert answer.usage.prompt_tokens == len(output.prompt_token_ids)


def test_prompts_of_every_kind(client, llm):
    ids = llm.tokenizer(PROMPT).input_ids
    texts = [
        [choice.text for choice in client.completions.create(model="tiny", prompt=prompt, temperature=0).choices]
        for prompt in (PROMPT, [PROMPT], ids, [ids, ids])
    ]
    assert texts[0] == texts[1] == texts[2]
    assert texts[3] == texts[0] * 2


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_several_prompts_and_completions(client, llm, stream):
    prompts = ["one", "another", "a third"]
    answer = client.completions.create(
        model="tiny", prompt=prompts, n=2, seed=5, max_tokens=8, stream=stream, temperature=0.9
    )
    texts = dict.fromkeys(range(6), "")
    if stream:
        for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        assert [choice.index for choice in answer.choices] == list(range(6))
        texts = {choice.index: choice.text for choice in answer.choices}
        assert answer.usage.completion_tokens == 48
    params = SamplingParams(n=2, seed=5, max_tokens=8, temperature=0.9)
    outputs = llm.generate(prompts, params)
    assert list(texts.values()) == [one.text for output in outputs for one in output.outputs]


def test_parameters_reach_the_engine(client, llm):
    plain = expected(llm, PROMPT, max_tokens=24).outputs[0].text
    stop = plain[4:6]
    answer = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=24, stop=stop)
    assert answer.choices[0].text == plain[: plain.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    sampling = dict(temperature=1.3, top_p=0.8, seed=3, presence_penalty=1.0, frequency_penalty=0.5, max_tokens=16)
    extra = dict(top_k=20, min_p=0.01, repetition_penalty=1.2, ignore_eos=True, min_tokens=2, stop_token_ids=[1])
    answer = client.completions.create(model="tiny", prompt=PROMPT, **sampling, extra_body=extra)
    extra["stop_token_ids"] = (1,)
    [output] = llm.generate([PROMPT], SamplingParams(**sampling, **extra))
    assert answer.choices[0].text == output.outputs[0].text


def test_chat_logprobs(client, llm):
    request = dict(model="tiny", messages=MESSAGES, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3)
    content = client.chat.completions.create(**request).choices[0].logprobs.content
    tokens = expected(llm, llm.chat_prompt(MESSAGES), max_tokens=5, logprobs=3).outputs[0].logprobs
    assert [entry.token for entry in content] == [token.token for token in tokens]
    assert [entry.logprob for entry in content] == pytest.approx([token.logprob for token in tokens])
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob), "the likeliest was taken"
    streamed = [
        entry.logprob
        for chunk in client.chat.completions.create(**request, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == pytest.approx([entry.logprob for entry in content])


def test_completion_logprobs(client):
    request = dict(model="tiny", prompt=PROMPT, temperature=0, max_tokens=6, logprobs=2)
    logprobs = client.completions.create(**request).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 6
    lengths = [len(token) for token in logprobs.tokens]
    assert logprobs.text_offset == [sum(lengths[:index]) for index in range(6)]
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == pytest.approx(logprob) and logprob <= 0
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**request, stream=True)]
    assert [offset for chunk in chunks for offset in chunk.text_offset] == logprobs.text_offset


def test_the_prompts_own_head_is_cached(client):
    prompt = "a rather long beginning that two prompts have in common, " * 20
    first, second = (
        client.completions.create(model="tiny", prompt=prompt + end, max_tokens=2).usage for end in ("one", "two")
    )
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens > 512


def test_too_long(client, llm):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x" * (llm.max_model_len + 1))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", max_tokens=llm.max_model_len)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="max_num_seqs = 4") as caught:
        client.completions.create(model="tiny", prompt="x", n=5)
    assert caught.value.param == "n"


def test_token_ids_beyond_the_vocabulary(client):
    with pytest.raises(openai.BadRequestError, match="between 0 and 257"):
        client.completions.create(model="tiny", prompt=[5, 258])


def test_messages_that_the_template_refuses(client):
    document = client.post("/documents", body={"text": "some text"}, cast_to=object)
    with pytest.raises(openai.BadRequestError, match="first message must be the user's"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "assistant", "content": "x"}],
            extra_body={"document": document["id"]},
        )
    client.delete(f"/documents/{document['id']}", cast_to=object)


async def _ask(client, count):
    return [
        (await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=8))
        for _ in range(count)
    ]


def test_asynchronous_client(server, llm):
    import asyncio

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(_ask(client, 2) for _ in range(6)))

    text = expected(llm, llm.chat_prompt(MESSAGES), max_tokens=8).outputs[0].text
    answers = asyncio.run(run())
    assert [answer.choices[0].message.content for pair in answers for answer in pair] == [text] * 12


def test_nothing_is_left_open(llm):
    statistics = llm.statistics()
    assert statistics.num_running == statistics.num_waiting == statistics.num_documents == 0


def test_the_words_for_too_long_are_openais(client, llm):
    most = llm.max_model_len
    count = len(llm.chat_prompt(MESSAGES))
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=most)
    assert caught.value.code == "context_length_exceeded" and caught.value.type == "invalid_request_error"
    assert caught.value.body["message"] == (
        f"This model's maximum context length is {most} tokens. However, you requested {count + most} tokens ({count} "
        f"in the prompt, {most} in the completion). Please reduce the length of the prompt or completion (max_tokens). "
        "[context_length_exceeded]"
    )
    assert "context_length_exceeded" in str(caught.value), "langchain looks there"


def test_what_is_surely_too_long_is_not_tokenised(client, llm, monkeypatch):
    def never(self, *arguments, **options):
        raise AssertionError("it was tokenised")

    text = "word and word " * 200_000
    monkeypatch.setattr(type(llm.tokenizer), "__call__", never)
    expected = (
        rf"^Error code: 400 .*maximum context length is {llm.max_model_len} tokens.*requested at least \d+ tokens"
    )
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=expected):
            client.completions.create(model="tiny", prompt=text, stream=stream)
        with pytest.raises(openai.BadRequestError, match=expected):
            client.completions.create(model="tiny", prompt=["x" * 20_000, text], stream=stream)
        with pytest.raises(openai.BadRequestError, match=expected):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], stream=stream)
    with pytest.raises(openai.BadRequestError, match=r"the document has at least [\d,]+ tokens"):
        client.post("/documents", body={"text": text}, cast_to=object)
    assert client.get("/documents", cast_to=object)["data"] == []
