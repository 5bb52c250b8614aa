"""Prompts in a model's chat format, with and without a document that was read before.

A document is the beginning of the first user message. Where the template would put it is found by rendering a marker
in its place: what stands before the marker is read with the document, what follows it with each question.
"""

import secrets
from typing import Any

from transformers import PreTrainedTokenizerBase

BETWEEN = "\n\n"


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A document as the beginning of a user's message, or as it is where there is no chat template."""
    text = text.strip()
    if not text:
        raise ValueError("the document is empty")
    if not tokenizer.chat_template:
        return list(tokenizer(text).input_ids)
    marker = _marker()
    before, _, _ = _render(tokenizer, [{"role": "user", "content": marker}]).partition(marker)
    return list(tokenizer(before + text, add_special_tokens=False).input_ids)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, after_document: bool
) -> list[int]:
    """Messages and the beginning of the answer. After a document, the rest of the message that begins with it.

    A system message cannot precede a document that has been read already, so it then stands before the question.

    Raises:
        ValueError: there is no chat template, or it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat template; give a text or token ids instead")
    if not messages:
        raise ValueError("messages must hold at least one message")
    if not after_document:
        return list(tokenizer(_render(tokenizer, messages), add_special_tokens=False).input_ids)
    system = [str(message["content"]) for message in messages if message.get("role") == "system"]
    turns = [dict(message) for message in messages if message.get("role") != "system"]
    if not turns or turns[0].get("role") != "user":
        raise ValueError("after a document the first message must be the user's")
    marker = _marker()
    turns[0]["content"] = BETWEEN.join([marker, *system, str(turns[0]["content"])])
    _, _, after = _render(tokenizer, turns).partition(marker)
    return list(tokenizer(after, add_special_tokens=False).input_ids)


def _marker() -> str:
    return f"document-{secrets.token_hex(8)}"


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    # Templates are programs of the model's makers, and refuse messages with errors of many kinds.
    except Exception as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error
