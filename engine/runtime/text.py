"""An answer's text as its tokens come: whole characters only, and nothing that may become a stop text."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"


class TextStream:
    """Turns tokens into text. What `text` holds never changes again, it only grows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stops: Sequence[str] = ()) -> None:
        """Without a tokenizer there is no text."""
        self.text = ""
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        # Decoding restarts one piece back: some tokenizers drop a leading space.
        self._context_start = self._decoded = 0
        self._held = ""

    def add(self, token: int, *, may_stop: bool = True) -> str | None:
        """Takes the next token; returns the stop text that it completed. `may_stop` False lets stop texts through."""
        if self._tokenizer is None:
            return None
        self._tokens.append(token)
        new = self._undecoded()
        if new.endswith(INCOMPLETE):  # a character whose last bytes are to come
            return None
        return self._take(new, may_stop=may_stop)

    def finish(self) -> None:
        """There are no more tokens: releases what was held back."""
        if self._tokenizer is not None:
            self.text += self._held + self._undecoded()
            self._held, self._context_start, self._decoded = "", len(self._tokens), len(self._tokens)

    def _take(self, new: str, *, may_stop: bool) -> str | None:
        self._context_start, self._decoded = self._decoded, len(self._tokens)
        held = self._held + new
        if not may_stop:
            self.text, self._held = self.text + held, ""
            return None
        found = [(place, stop) for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            place, stop = min(found)
            self.text, self._held = self.text + held[:place], ""
            # Later bytes of the same token are not part of the answer.
            self._context_start = self._decoded = len(self._tokens)
            return stop
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self.text += held[: len(held) - keep]
        self._held = held[len(held) - keep :]
        return None

    def _undecoded(self) -> str:
        context = self._decode(self._tokens[self._context_start : self._decoded])
        return self._decode(self._tokens[self._context_start :])[len(context) :]

    def _decode(self, tokens: list[int]) -> str:
        assert self._tokenizer is not None
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
