"""Documents and questions on their way to the model."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longshadow.prompts import encode_prompt, read_document, room_for_new_tokens
from tests.tiny_models import tiny_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"


@pytest.mark.parametrize(
    ("template", "question", "text"),
    [
        (None, None, "A text."),
        (None, "Why?", "A text.\n\nWhy?"),
        (TEMPLATE, None, "<user>A text.<answer>"),
        (TEMPLATE, "Why?", "<user>A text.\n\nWhy?<answer>"),
    ],
)
def test_prompt(template: str | None, question: str | None, text: str) -> None:
    tokenizer = tiny_tokenizer(template)
    ids = encode_prompt(tokenizer, "\nA text.\n", question)
    assert ids.shape == (1, len(text))
    assert tokenizer.decode(ids[0]) == text


def test_document_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfGr\xc3\xbc\xc3\x9fe")
    assert read_document(str(file)) == "Grüße"


def test_document_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", stream(b"text"))
    assert read_document("-") == "text"


def stream(content: bytes, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"buffer": io.BytesIO(content), "closed": False, "isatty": lambda: False, **changes})


@pytest.mark.parametrize(
    ("stdin", "reason"),
    [
        (None, "cannot read the prompt file standard input: it is closed"),
        (stream(b"", closed=True), "standard input: it is closed"),
        (stream(b"", isatty=lambda: True), "standard input: it is a terminal"),
        (stream(b""), "standard input is empty"),
        (stream(b" \n"), "standard input is empty"),
        (stream(b"\x7fELF\x02\xff"), r"standard input is not UTF-8 text \(byte 5\)"),
        (stream("text".encode("utf-16")), "standard input is not UTF-8 text"),
        (stream("text".encode("utf-16-le")), "standard input is not text: it holds zero bytes"),
    ],
)
def test_standard_input_that_holds_no_text(stdin: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(ValueError, match=reason):
        read_document("-")


def test_documents_that_cannot_be_read(tmp_path: Path) -> None:
    latin, blank = tmp_path / "latin.txt", tmp_path / "blank.txt"
    latin.write_bytes(b"Gr\xfc\xdfe")
    blank.write_text(" \n\t")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text \(byte 2\)"):
        read_document(str(latin))
    with pytest.raises(ValueError, match=r"blank\.txt is empty"):
        read_document(str(blank))
    with pytest.raises(ValueError, match=r"none\.txt: No such file"):
        read_document(str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match=r"Is a directory"):
        read_document(str(tmp_path))


def test_room_for_new_tokens() -> None:
    assert room_for_new_tokens(100, None, 50) == 50
    assert room_for_new_tokens(100, 200, 50) == 50
    assert room_for_new_tokens(180, 200, 50) == 20
    with pytest.raises(ValueError, match=r"the prompt has 8,192 tokens, but the model has 8,192 positions"):
        room_for_new_tokens(8192, 8192, 1)
