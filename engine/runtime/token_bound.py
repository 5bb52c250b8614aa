"""The least number of tokens that a text can have, found in a moment: what is surely too long need not be tokenised.

A token covers at most as many letters as the vocabulary's token with most letters does, so a text has at least as many
tokens as its letters divided by that. The same holds for digits, punctuation, white space, bytes beyond ASCII, and for
beginnings of words, which almost every vocabulary keeps to one per token; the largest of these bounds counts.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

WORD, LETTER, DIGIT, SPACE, MARK, HIGH = range(6)
NUM_FEATURES = 6
SPACE_SIGN = "▁"
PIECE = 1 << 20  # characters that are looked at together
FIRST_HIGH = 0x80
# What leaves every letter, digit and mark in the text, unless a combining character follows.
KEEPING_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend")
KEEPING_PRE_TOKENIZERS = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split")

# GPT-2's alphabet, in which byte-level vocabularies are written: printable bytes stand for themselves.
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_OF = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF |= {chr(256 + number): byte for number, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}

Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]


class TokenBound:
    """A tokenizer's bound.

    Args:
        most: of each feature, what one token covers at most.
        counted: bytes that cannot get lost, because each is a token by itself.
        composes: whether a character beyond ASCII can swallow the one before it.
    """

    def __init__(self, most: npt.NDArray[np.int64], counted: Flags, *, composes: bool) -> None:
        self._most = most
        self._counted = counted
        self._composes = composes

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TokenBound | None":
        """None for a tokenizer of which too little is known: one that can drop text, or merge it without limit."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or type(backend.model).__name__ != "BPE":
            return None
        normalizers, pre_tokenizers = list(_parts(backend.normalizer)), list(_parts(backend.pre_tokenizer))
        if not all(map(_keeps_text, normalizers)) or not all(map(_splits_only, pre_tokenizers)):
            return None
        by_bytes = any(part["type"] == "ByteLevel" for part in pre_tokenizers)
        if not by_bytes and not backend.model.byte_fallback:
            return None
        added = backend.get_added_tokens_decoder().values()
        own = backend.get_vocab(with_added_tokens=False)
        tokens = [_bytes_of(token) for token in own] if by_bytes else [token.encode() for token in own]
        tokens += [token.content.encode() for token in added]
        most = _most_features(tokens)
        if not by_bytes:  # the sign stands for a space, unless the text has it
            spaced = [token.encode() for token in (token.replace(SPACE_SIGN, " ") for token in own)]
            most = np.maximum(most, _most_features(spaced))
        if any(token.lstrip or token.rstrip for token in added):  # swallows the space around it
            most[SPACE] = 0
        composes = any(part["type"] not in ("Prepend", "Replace") for part in normalizers)
        if composes:
            most[HIGH] = 0
        single = {token[0] for token in tokens if len(token) == 1}
        if not by_bytes:
            single |= {byte for byte in range(256) if f"<0x{byte:02X}>" in own}
            single |= {ord(" ")} if SPACE_SIGN in own else set()
        counted = np.zeros(256, dtype=bool)
        counted[list(single)] = True
        return cls(most, counted, composes=composes)

    def least_tokens(self, texts: Iterable[str], enough: int) -> int:
        """At least so many tokens do these texts have together; counting stops beyond `enough`."""
        totals, least = np.zeros(NUM_FEATURES, dtype=np.int64), 0
        for piece in _pieces(texts):
            totals += self._totals(piece)
            each = zip(totals.tolist(), self._most.tolist(), strict=True)
            least = max((-(-total // most) for total, most in each if most), default=0)
            if least > enough:
                break
        return least

    def _totals(self, piece: str) -> npt.NDArray[np.int64]:
        data = np.frombuffer(piece.encode(errors="replace"), dtype=np.uint8)
        kept = self._counted[data]
        if self._composes:
            kept[:-1] &= data[1:] < FIRST_HIGH
            kept[-1:] = False
        return np.array([np.count_nonzero(feature & kept) for feature in _features(data)], dtype=np.int64)


def _features(data: Bytes) -> list[Flags]:
    """Bytes that count for each feature."""
    folded = data | 0x20
    letter = (folded >= ord("a")) & (folded <= ord("z")) & (data < FIRST_HIGH)
    digit = (data >= ord("0")) & (data <= ord("9"))
    space = (data == ord(" ")) | ((data >= 9) & (data <= 13))
    high = data >= FIRST_HIGH
    mark = (data > ord(" ")) & (data < 0x7F) & ~letter & ~digit
    word = letter.copy()
    word[1:] &= space[:-1]
    word[:1] = False  # its text may have gone on from another
    return [word, letter, digit, space, mark, high]


def _most_features(tokens: list[bytes]) -> npt.NDArray[np.int64]:
    # A space in between, so that a token's first letter counts as the beginning of a word, which it may be.
    data = np.frombuffer(b" " + b" ".join(tokens), dtype=np.uint8)
    starts = np.cumsum([0] + [len(token) + 1 for token in tokens[:-1]])
    sums = [np.add.reduceat(feature.astype(np.int64), starts) for feature in _features(data)]
    sums[SPACE] = sums[SPACE] - 1
    return np.array([int(each.max()) for each in sums], dtype=np.int64)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), PIECE):
            yield text[start : start + PIECE]


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer and those it consists of, as tokenizer.json has them."""
    if component is None:
        return
    waiting = [json.loads(component.__getstate__())]
    while waiting:
        part = waiting.pop()
        if part["type"] == "Sequence":
            waiting += part.get("normalizers", part.get("pretokenizers", ()))
        else:
            yield part


def _keeps_text(part: dict[str, Any]) -> bool:
    if part["type"] == "Replace":
        return bool(part["pattern"] == {"String": " "} and part["content"] == SPACE_SIGN)
    return part["type"] in KEEPING_NORMALIZERS


def _splits_only(part: dict[str, Any]) -> bool:
    return part["type"] in KEEPING_PRE_TOKENIZERS and part.get("behavior") != "Removed"


def _bytes_of(token: str) -> bytes:
    return bytes(BYTE_OF.get(character, ord("?")) for character in token)
