"""Keeps a tokenizer's control tokens out of texts: in documents and messages `<|im_end|>` is eight characters.

A control token that stands in a text gets a mark inside before the chat template is rendered, so that all that is left
unmarked is the template's. The rendered text is then cut at the marks and encoded piece by piece. Texts without control
tokens have no marks, and are encoded as ever.
"""

import re
import secrets
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

SAMPLE = tuple({"role": role, "content": "text"} for role in ("user", "assistant", "user"))
# What a piece is encoded behind, so that it is not the beginning of a text, which some tokenizers put a space before.
ANCHORS = ("a", "0", ".", "<")


class ControlTokens:
    """Control tokens of a tokenizer: special ones, and whatever its template writes around turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        frame = _sample(tokenizer)
        found = special | {token.content for token in added if token.content in frame}
        # One character cannot be cut in two.
        names = sorted((name for name in found if len(name) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._matched_normalised = any(token.normalized and token.content in found for token in added)
        self._mark = _mark(names)

    def marked(self, value: Any) -> Any:
        """The same texts, in dictionaries and lists, too, with a mark inside each control token."""
        if isinstance(value, str):
            return self._marked_text(value)
        if isinstance(value, Mapping):
            # Templates look for names, and write those of a tool's arguments.
            return {self.marked(key): self.marked(one) for key, one in value.items()}
        return [self.marked(one) for one in value] if isinstance(value, list | tuple) else value

    def _marked_text(self, text: str) -> str:
        text = self._marked_as_written(text)
        if self._matched_normalised:
            normalizer = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "normalizer", None)
            normal = text if normalizer is None else str(normalizer.normalize_str(text))
            text = self._marked_as_written(normal) if self._pattern.search(normal) else text
        return text

    def _marked_as_written(self, text: str) -> str:
        # What is left of one token may begin or end another.
        while self._pattern.search(text):
            text = self._pattern.sub(lambda found: found[0][0] + self._mark + found[0][1:], text)
        return text

    def unmarked(self, marked: str) -> str:
        """The text without its marks."""
        return marked.replace(self._mark, "")

    def encode(self, marked: str) -> list[int]:
        """Token ids of a text with marks, without special tokens around it."""
        first, *rest = marked.split(self._mark)
        tokens = self._ids(first)
        for piece in rest:
            tokens += self._ids_behind(piece)
        return tokens

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around one."""
        marked = self._marked_text(text)
        if marked == text:
            return list(self._tokenizer(text).input_ids)
        bare, whole = self._ids(ANCHORS[0]), list(self._tokenizer(ANCHORS[0]).input_ids)
        start = next((start for start in range(len(whole)) if whole[start : start + len(bare)] == bare), 0)
        return whole[:start] + self.encode(marked) + whole[start + len(bare) :]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _ids_behind(self, piece: str) -> list[int]:
        for anchor in ANCHORS:
            before, both = self._ids(anchor), self._ids(anchor + piece)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._ids(piece)


def _sample(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short conversation as the template writes it; nothing where there is none, or it wants others."""
    if not tokenizer.chat_template:
        return ""
    try:
        return str(tokenizer.apply_chat_template(list(SAMPLE), tokenize=False, add_generation_prompt=False))
    # Templates are programs of the model's makers, and refuse messages with errors of many kinds.
    except Exception:
        return ""


def _mark(names: list[str]) -> str:
    """Letters and digits that no text holds and that hold no control token."""
    while True:
        mark = f"mark{secrets.token_hex(12)}"
        if not any(name in mark for name in names):
            return mark
