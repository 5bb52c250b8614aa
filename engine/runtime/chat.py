"""Prompts in a model's chat format, with and without a document that was read before.

A document is the beginning of the first user message. Where the template would put it is found by rendering a marker
in its place: what stands before the marker is read with the document, what follows it with each question. Control
tokens that stand in documents or messages are text.
"""

import secrets
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from longshadow.engine.runtime.control_tokens import ControlTokens
from longshadow.engine.runtime.messages import normalised
from longshadow.engine.runtime.sampling_params import check_unicode

BETWEEN = "\n\n"


def _no_check(text: str) -> None:
    """Any length will do."""


def encode_document(
    tokenizer: PreTrainedTokenizerBase, text: str, *, check: Callable[[str], None] = _no_check
) -> list[int]:
    """A document as the beginning of a user's message, or as it is where there is no chat template.

    Args:
        check: called with the text before it is tokenised.
    """
    check_unicode("the document", text)
    text = text.strip()
    if not text:
        raise ValueError("the document is empty")
    check(text)
    control = ControlTokens(tokenizer)
    if not tokenizer.chat_template:
        return control.encode_text(text)
    marker = _marker()
    before, _, _ = _render(tokenizer, [{"role": "user", "content": marker}]).partition(marker)
    return control.encode(before + control.marked(text))


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    after_document: bool,
    check: Callable[[str], None] = _no_check,
) -> list[int]:
    """Messages and the beginning of the answer. After a document, the rest of the message that begins with it.

    A system message cannot precede a document that has been read already, so it then stands before the question.

    Args:
        check: called with the rendered text before it is tokenised; templates can leave messages out.

    Raises:
        ValueError: there is no chat template, it refuses the messages, or they are no messages of text.
    """
    if not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat template; give a text or token ids instead")
    control = ControlTokens(tokenizer)
    turns: list[dict[str, Any]] = control.marked(normalised(messages))
    if not after_document:
        whole = _render(tokenizer, turns)
        check(control.unmarked(whole))
        return control.encode(whole)
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    turns = [turn for turn in turns if turn["role"] != "system"]
    if not turns or turns[0]["role"] != "user":
        raise ValueError("after a document the first message must be the user's")
    marker = _marker()
    turns[0]["content"] = BETWEEN.join([marker, *system, turns[0]["content"]])
    _, _, after = _render(tokenizer, turns).partition(marker)
    check(control.unmarked(after))
    return control.encode(after)


def _marker() -> str:
    return f"document-{secrets.token_hex(8)}"


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    # Templates are programs of the model's makers, and refuse messages with errors of many kinds.
    except Exception as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error
