"""Bodies of many small values: counted before they are parsed, and refused at the first that is wrong."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from longshadow.engine.serving.bodies import ChatCompletionBody, CompletionBody
from longshadow.engine.serving.errors import ApiError
from longshadow.engine.serving.structure import check_structure
from tests.engine.serving.conftest import serving
from tests.engine.serving.fake_engine import FakeEngine
from tests.engine.serving.test_bodies import CHAT, COMPLETION, post, refusal

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a,[{"\\\\\n', max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text('a,["\\\\', max_size=4), inner, max_size=5),
    max_leaves=20,
)


def passes(body, most):
    try:
        check_structure(body, most)
    except ApiError:
        return False
    return True


def num_marks(value):
    """Commas and opening brackets outside strings."""
    match value:
        case list() | dict():
            inner = list(value.values()) if isinstance(value, dict) else value
            return 1 + max(0, len(inner) - 1) + sum(map(num_marks, inner))
    return 0


@settings(deadline=None)
@given(VALUES, st.booleans())
def test_values_are_counted_as_a_parser_would(value, ascii_only):
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    marks = num_marks(value)
    assert passes(body, marks)
    assert not marks or not passes(body, marks - 1)


def test_many_strings_are_many_values():
    assert not passes(b"[" + b'"",' * 1000, 400)
    assert passes(json.dumps('a","' * 1000).encode(), 400)


def test_a_body_of_too_many_values_is_refused():
    with serving(FakeEngine()) as server, server.client() as client:
        for prompt in ([1] * 1_100_000, [[1]] * 600_000, [{}] * 600_000):
            error = refusal(post(client, "/v1/completions", COMPLETION | {"prompt": prompt}))
            assert error["code"] == "too_many_values" and "1,048,576" in error["message"]
        text = "one, two, [three], " * 200_000
        assert client.post("/v1/completions", json=COMPLETION | {"prompt": text[:2000]}).status_code == 200
        # Its length counts as tokens, not as values.
        assert refusal(post(client, "/v1/documents", {"text": text}))["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (CompletionBody, {"prompt": ["a"] * 100_000}),
        (CompletionBody, {"prompt": [-1] * 100_000}),
        (CompletionBody, {"prompt": [[1]] * 100_000}),
        (CompletionBody, {"prompt": [[-1] * 100_000] * 2}),
        (CompletionBody, {"stop": [""] * 100_000}),
        (CompletionBody, {"stop_token_ids": [-1] * 100_000}),
        (ChatCompletionBody, {"messages": [1] * 100_000}),
        (ChatCompletionBody, {"messages": [{}] * 100_000}),
        (ChatCompletionBody, {"messages": [CHAT["messages"][0]] * 100_000}),
        (ChatCompletionBody, {"messages": [{"role": "user", "content": [{"type": "x"}] * 100_000}]}),
        (ChatCompletionBody, dict.fromkeys(map(str, range(100_000)), 1)),
        (ChatCompletionBody, {"metadata": dict.fromkeys(map(str, range(100_000)), 1)}),
    ],
)
def test_a_long_list_of_wrong_values_has_few_problems(kind, changes):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate((CHAT if kind is ChatCompletionBody else COMPLETION) | changes)
    assert caught.value.error_count() <= 10
