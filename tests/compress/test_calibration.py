"""Text in, token blocks out, no document in two parts."""

from pathlib import Path

import pytest

from longshadow.compress.calibration import read_documents, split_blocks
from tests.tiny_models import tiny_tokenizer


def test_documents(tmp_path: Path) -> None:
    assert len(read_documents("builtin")) > 50
    lines, text = tmp_path / "a.jsonl", tmp_path / "a.txt"
    lines.write_text('{"text": "one"}\n\n{"text": "two", "more": 1}\n', encoding="utf-8")
    text.write_text("one\n\ntwo\nlines\n\n\n", encoding="utf-8")
    assert read_documents(str(lines)) == ["one", "two"] and read_documents(str(text)) == ["one", "two\nlines"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\nnot json\n', "line 2 is not JSON"),
        ("a.jsonl", '{"words": "x"}\n', 'line 1 has no column "text"'),
        ("a.txt", " \n\n", "is empty"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_documents(str(tmp_path / name))
    with pytest.raises(ValueError, match="cannot read"):
        read_documents(str(tmp_path / "missing.txt"))


@pytest.mark.parametrize("source", ["hf:", "hf::en"])
def test_a_data_set_without_a_name(source: str) -> None:
    with pytest.raises(ValueError, match="hf: names no data set: give hf:NAME or hf:NAME:CONFIGURATION"):
        read_documents(source)


def test_parts_have_documents_of_their_own() -> None:
    tokenizer = tiny_tokenizer()
    documents = [letter * 50 for letter in "abcdefghij"]
    splits = split_blocks(tokenizer, documents, length=16, samples=60)
    texts = [set(tokenizer.decode(part.flatten())) - {"\n"} for part in vars(splits).values()]
    assert [sorted(text) for text in texts] == [list("abcfgh"), list("di"), list("ej")]
    assert splits.calibration.shape == (19, 16) and splits.selection.shape == splits.report.shape == (6, 16)
    assert [len(part) for part in vars(split_blocks(tokenizer, documents, length=16, samples=7)).values()] == [7, 2, 2]
    with pytest.raises(ValueError, match="fewer than one sample of 200"):
        split_blocks(tokenizer, documents, length=200, samples=6)
