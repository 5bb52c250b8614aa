"""Messages of a chat, whoever sends them, as chat templates take them: a role and one text each."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from longshadow.engine.runtime.sampling_params import check_unicode

# A part's type and where its text stands: OpenAI's two interfaces, and an assistant's refusal.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def normalised(messages: object) -> list[dict[str, Any]]:
    """Copies of the messages, each with a text as its content; other fields, such as tool calls, stay.

    Raises ValueError, in one line with the message's number, for anything that is no message of text.
    """
    found: list[Any] = [_fields(message) for message in messages] if isinstance(messages, list | tuple) else [None]
    if not all(isinstance(message, Mapping) for message in found):
        raise ValueError("messages must be a list of objects with `role` and `content`")
    if not found:
        raise ValueError("messages must hold at least one message")
    return [_normalised(f"message {number}", message) for number, message in enumerate(found, 1)]


def template_role(role: str) -> str:
    """A developer's message is what was called a system message before; templates know the older name."""
    return "system" if role == "developer" else role


def joined(texts: Iterable[str]) -> str:
    """The text of a content that comes in parts."""
    return "\n".join(texts)


def _fields(value: Any) -> Any:
    """A message or part of a client's library as a mapping: pydantic's, such as openai's, and dataclasses."""
    if isinstance(value, type | Mapping):
        return value
    if callable(dump := getattr(value, "model_dump", None)):
        return dump(exclude_none=True)
    is_instance = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_instance else value


def _normalised(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where} must have a role, such as 'user', got {role!r}")
    where = f"{where} ({role!r})"
    changes: dict[str, Any] = {"role": template_role(role), "content": _text(where, message)}
    if calls := message.get("tool_calls"):
        changes["tool_calls"] = _with_objects(where, calls)
    _check_texts(where, message)
    return {**message, **changes}


def _text(where: str, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and (message.get("tool_calls") or message.get("function_call")):
        return ""
    if isinstance(content, list | tuple) and content:
        return joined(_part(where, part) for part in content)
    got = "none" if content in (None, [], ()) else f"a {type(content).__name__}"
    raise ValueError(f"{where} must have a text, or a list of text parts, as its content, got {got}")


def _part(where: str, part: object) -> str:
    if isinstance(part, str):
        return part
    part = _fields(part)
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    name = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if name is None or not isinstance(part, Mapping):
        raise ValueError(f"{where} has a part of type {kind!r}; only text is understood, as {{'type': 'text', ...}}")
    text = part.get(name)
    if not isinstance(text, str):
        raise ValueError(f"{where} has a part of type {kind!r} whose {name} is no text")
    return text


def _with_objects(where: str, calls: object) -> list[dict[str, Any]]:
    """Tool calls whose arguments are objects: OpenAI's clients send them as JSON texts, templates write JSON."""
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"{where} must have a list of objects as its tool_calls")
    return [
        {**call, "function": _with_object(call["function"])}
        if isinstance(call.get("function"), Mapping)
        else dict(call)
        for call in calls
    ]


def _with_object(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    return {**function, "arguments": arguments} if isinstance(arguments, Mapping) else dict(function)


def _check_texts(where: str, value: object) -> None:
    if isinstance(value, str):
        check_unicode(where, value)
    elif isinstance(value, Mapping):
        for one in value.values():
            _check_texts(where, one)
    elif isinstance(value, list | tuple):
        for one in value:
            _check_texts(where, one)
