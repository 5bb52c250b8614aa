"""Messages from anywhere become texts, or one line says why not."""

import dataclasses
from typing import Any

import pytest
from pydantic import BaseModel

from longshadow.engine.runtime.chat import encode_chat
from longshadow.engine.runtime.messages import normalised
from longshadow.engine.serving.bodies import ChatCompletionBody
from tests.engine.runtime.engines import CHAT_TEMPLATE
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer(CHAT_TEMPLATE)
PARTS: list[tuple[Any, str]] = [
    ("Why?", "Why?"),
    ([{"type": "text", "text": "Why?"}], "Why?"),
    ([{"type": "text", "text": "Why"}, {"type": "text", "text": "not?"}], "Why\nnot?"),
]


@pytest.mark.parametrize("after_document", [False, True])
@pytest.mark.parametrize(("content", "text"), [*PARTS, (["Why", {"type": "input_text", "text": "not?"}], "Why\nnot?")])
def test_parts_are_joined_with_and_without_a_document(content: Any, text: str, after_document: bool) -> None:
    messages = [{"role": "developer", "content": content}, {"role": "user", "content": content}]
    plain = [{"role": "system", "content": text}, {"role": "user", "content": text}]
    assert encode_chat(TOKENIZER, messages, after_document=after_document) == encode_chat(
        TOKENIZER, plain, after_document=after_document
    )
    assert messages[1]["content"] is content


@pytest.mark.parametrize(("content", "text"), PARTS)
def test_the_server_joins_them_the_same_way(content: Any, text: str) -> None:
    message = {"role": "developer", "content": content}
    body = ChatCompletionBody.model_validate({"model": "m", "messages": [message]})
    [turn] = normalised([message])
    assert body.messages[0].as_turn() == turn == {"role": "system", "content": text}


class Turn(BaseModel):
    """As openai's messages, which a client puts back into its history."""

    role: str
    content: str | list[dict[str, str]] | None
    refusal: str | None = None


@dataclasses.dataclass
class Plain:
    """A caller's own."""

    role: str
    content: str


def test_objects_of_clients_libraries_are_messages() -> None:
    turns: Any = [Turn(role="user", content="Why?"), Plain("assistant", "So."), Turn(role="user", content="Why not?")]
    plain = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    plain.append({"role": "user", "content": "Why not?"})
    expected = encode_chat(TOKENIZER, plain, after_document=False)
    assert encode_chat(TOKENIZER, turns, after_document=False) == expected
    assert normalised(turns) == plain
    assert normalised([Turn(role="user", content=[{"type": "text", "text": "Why?"}])]) == plain[:1]
    with pytest.raises(ValueError, match="got none"):
        normalised([Turn(role="user", content=None)])
    with pytest.raises(ValueError, match="list of objects"):
        normalised([Turn])


def test_calls_of_tools_need_no_content_and_have_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    turns = normalised([{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "x"}])
    assert turns[0]["content"] == "" and turns[1] == {"role": "tool", "content": "x"}
    assert turns[0]["tool_calls"][0]["function"]["arguments"] == {"a": [1]}
    assert call["function"] == {"name": "f", "arguments": '{"a": [1]}'}
    [odd] = normalised([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "no JSON"}}]}])
    assert odd["tool_calls"][0]["function"]["arguments"] == "no JSON"


@pytest.mark.parametrize("after_document", [False, True])
@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one message"),
        ("hello", "must be a list of objects"),
        (["hello"], "must be a list of objects"),
        ({"role": "user", "content": "a"}, "must be a list of objects"),
        ([{"content": "a"}], "message 1 must have a role"),
        ([{"role": 5, "content": "a"}], "message 1 must have a role"),
        ([{"role": "user"}], r"message 1 \(\'user\'\) must have a text"),
        ([{"role": "user", "content": None}], "must have a text, .* got none"),
        ([{"role": "user", "content": []}], "must have a text, .* got none"),
        ([{"role": "user", "content": 5}], "must have a text, .* got a int"),
        ([{"role": "user", "content": b"a"}], "must have a text, .* got a bytes"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": {"a": 1}}], "message 2 .* got a dict"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "a part of type 'image_url'"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], r"a part of type \['text'\]"),
        ([{"role": "user", "content": [{"text": "a"}]}], "a part of type None"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "whose text is no text"),
        ([{"role": "user", "content": [5]}], "a part of type 'int'"),
        ([{"role": "user", "content": "\ud800"}], r"message 1 .* character 0 is half of a surrogate pair"),
        ([{"role": "assistant", "content": "a", "tool_calls": "f"}], "a list of objects as its tool_calls"),
    ],
)
def test_other_messages_are_refused_in_one_line(messages: Any, reason: str, after_document: bool) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        encode_chat(TOKENIZER, messages, after_document=after_document)
    assert "\n" not in str(refusal.value)
