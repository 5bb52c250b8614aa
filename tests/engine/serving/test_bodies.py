"""Parameters: which are supported, which pass at their defaults only, and how the rest is refused."""

import json

import pytest

from longshadow.engine.serving.bodies import ChatCompletionBody, CompletionBody
from tests.engine.serving.conftest import serving
from tests.engine.serving.fake_engine import FakeEngine

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
COMPLETION = {"model": "tiny", "prompt": "hello", "max_tokens": 3}


@pytest.fixture(scope="module")
def client():
    with serving(FakeEngine(), max_body_bytes=100_000) as server, server.client() as client:
        yield client


def chat(client, **changes):
    return post(client, "/v1/chat/completions", CHAT | changes)


def complete(client, **changes):
    return post(client, "/v1/completions", COMPLETION | changes)


def post(client, path, body):
    """As ASCII, so that a body can hold half a surrogate pair."""
    return client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


def refusal(response, status=400):
    """The error of a refused request, in OpenAI's shape."""
    assert response.status_code == status, response.text
    [error] = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("logit_bias", {"5": 10}),
        ("store", True),
        ("service_tier", "flex"),
        ("prediction", {"type": "content", "content": "x"}),
        ("reasoning_effort", "high"),
        ("web_search_options", {}),
        ("stream_options", {"include_obfuscation": 1}),
    ],
)
def test_unsupported_in_chats(client, name, value):
    error = refusal(chat(client, stream=True, **{name: value}))
    assert error["param"].split(".")[0] == name
    assert error["code"] == "unsupported_parameter"
    assert "not supported" in error["message"]


@pytest.mark.parametrize(
    ("name", "value"), [("best_of", 2), ("echo", True), ("suffix", "end"), ("logit_bias", {"1": 1})]
)
def test_unsupported_in_completions(client, name, value):
    error = refusal(complete(client, **{name: value}))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_defaults_of_what_is_unsupported_pass(client):
    response = chat(
        client,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        logit_bias={},
        audio=None,
        parallel_tool_calls=True,
        store=False,
        service_tier="auto",
        metadata={"run": "7"},
        user="someone",
        safety_identifier="a",
        prompt_cache_key="b",
    )
    assert response.status_code == 200, response.text
    assert complete(client, best_of=1, echo=False, suffix="", user="someone").status_code == 200


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        ({"temprature": 1}, "temprature"),
        ({"\ud800": 1}, None),
        ({"messages": [{"role": "assistant", "content": "x"}]}, None),
    ],
)
def test_wrong_values(client, changes, param):
    found = refusal(chat(client, **changes))["param"]
    assert found is None or found.startswith(param or "")
    assert found is not None or param is None


@pytest.mark.parametrize(
    "prompt",
    [[], [[]], [-1], [1.5], 5, None, {}, ["a"] * 129, [[1], "a"], [2**40]],
    ids=lambda prompt: str(prompt)[:12],
)
def test_wrong_prompts(client, prompt):
    assert refusal(complete(client, prompt=prompt))["param"].startswith("prompt")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"{" * 5000,
        b"[" * 50_000,
        b'{"model": NaN}',
        b'{"n": 1e999}',
        b"1" * 5000,
    ],
    ids=lambda body: str(body[:10]),
)
def test_malformed_bodies(client, body):
    response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    refusal(response)


def test_a_form_is_no_json(client):
    refusal(client.post("/v1/documents", data={"text": "hello"}))
    refusal(client.post("/v1/documents", content=b'{"text": "hello"}', headers={"Content-Type": "text/plain"}))


def test_all_problems_of_a_union_are_told(client):
    error = refusal(complete(client, prompt=5))
    assert "string" in error["message"] and "list" in error["message"]


def test_another_model_is_not_found(client):
    error = refusal(chat(client, model="gpt-4o"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "'tiny'" in error["message"]
    assert refusal(client.get("/v1/models/gpt-4o"), 404)["code"] == "model_not_found"


def test_unknown_paths_and_methods(client):
    refusal(client.get("/v1/nothing"), 404)
    response = client.get("/v1/chat/completions")
    refusal(response, 405)
    assert response.headers["allow"] == "POST"


def test_the_answers_length_follows_from_the_room(client):
    ended = chat(client, max_tokens=None, messages=[{"role": "user", "content": "x" * 3000}]).json()["usage"]
    assert ended["completion_tokens"] == 1096
    ended = chat(client, max_tokens=None, messages=[{"role": "user", "content": "x" * 4090}]).json()["usage"]
    assert ended["completion_tokens"] == 6
    assert complete(client, max_tokens=None).json()["usage"]["completion_tokens"] == 16


def test_a_conversation_as_the_openai_client_replays_it(client):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "hi", "name": "someone"},
        {"role": "assistant", "content": "0", "refusal": None, "tool_calls": None, "annotations": [], "audio": None},
        {"role": "user", "content": "go on"},
    ]
    assert chat(client, messages=messages).json()["usage"]["prompt_tokens"] == len("be\nbriefhi0go on")


def test_the_answers_length_can_be_chosen():
    with serving(FakeEngine(), default_max_tokens=7) as server, server.client() as client:
        assert chat(client, max_tokens=None).json()["usage"]["completion_tokens"] == 7
        assert chat(client, max_tokens=9).json()["usage"]["completion_tokens"] == 9
        long = [{"role": "user", "content": "x" * 4092}]
        assert chat(client, max_tokens=None, messages=long).json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("make", [ChatCompletionBody, CompletionBody])
def test_what_a_request_leaves_open_is_the_models_default(make):
    request = CHAT if make is ChatCompletionBody else COMPLETION

    def params(**changes):
        return make.model_validate(request | changes).sampling_params(3)

    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "min_tokens")
    assert {getattr(params(), name) for name in names} == {None}
    assert {getattr(params(**dict.fromkeys(names)), name) for name in names} == {None}
    assert params(stop=[]).stop == () and params(stop="a").stop == ("a",)
