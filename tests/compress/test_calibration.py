"""Text in, token blocks out, no document in two parts."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from longshadow.compress.calibration import read_documents, split_blocks, text_beginning
from tests.tiny_models import END, tiny_tokenizer


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


STORIES = [f"Story {number}, of a ship.\nIt sails." for number in range(7)]
CHATS = [[{"role": "user", "content": story}, {"role": "assistant", "content": "Aye."}] for story in STORIES]
ROWS = "\n".join(json.dumps({"text": story}) for story in STORIES)
TEMPLATE = "<|end|>{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\n\n".join(STORIES)),
        ("a.txt", "\ufeff" + "\r\n \r\n\r\n".join(STORIES).replace(".\nIt", ".\r\nIt") + "\r\n"),
        ("a.txt", "\n\n".join(STORIES).encode("utf-16")),
        ("a.txt.gz", gzip.compress("\n\n".join(STORIES).encode(), mtime=0)),
        ("a.jsonl", ROWS),
        ("a.ndjson", "\ufeff" + ROWS + "\n\n"),
        ("a.jsonl.gz", gzip.compress(ROWS.encode(), mtime=0)),
        ("a.json", ROWS),
        ("a.json", json.dumps([{"text": story} for story in STORIES], indent=1)),
        ("a.json", json.dumps({"data": [{"text": story} for story in STORIES]})),
        ("a.json", json.dumps(STORIES)),
        ("a.jsonl", "\n".join(json.dumps({"prompt": story[:9], "completion": story[9:]}) for story in STORIES)),
    ],
)
def test_every_way_to_write_the_same_documents(tmp_path: Path, name: str, content: str | bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_documents(str(path)) == STORIES


def test_a_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(story.replace("\n", " ") for story in STORIES), encoding="utf-8")
    assert read_documents(str(path)) == [story.replace("\n", " ") for story in STORIES]


def test_tables(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra train")
    rows = datasets.Dataset.from_dict({"number": list(range(7)), "text": STORIES, "other": STORIES[::-1]})
    rows.to_csv(tmp_path / "a.csv", index=False)
    rows.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    rows.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    for name in ("a.csv", "a.tsv", "a.parquet", "b.csv.gz"):
        assert read_documents(str(tmp_path / name)) == STORIES
        assert read_documents(str(tmp_path / name), column="other") == STORIES[::-1]
    with pytest.raises(
        ValueError, match=r'a\.csv, row 1 has no column "words"; of its columns \(number, text, other\)'
    ):
        read_documents(str(tmp_path / "a.csv"), column="words")
    (tmp_path / "b.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"cannot read .*b\.parquet as parquet: "):
        read_documents(str(tmp_path / "b.parquet"))


def test_characters_that_look_like_ends_of_lines(tmp_path: Path) -> None:
    odd = "one\u2028two\x85three\x0cfour\x1efive"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps({"text": odd}, ensure_ascii=False)] * 3), encoding="utf-8")
    assert read_documents(str(path)) == [odd] * 3
    path.write_text('{"text": "half \\ud83d, whole \\ud83d\\ude00"}\n' * 3, encoding="utf-8")
    assert read_documents(str(path)) == ["half \ufffd, whole \U0001f600"] * 3


def test_chats(tmp_path: Path) -> None:
    """Through the template, which begins them with the token that texts are not to have twice."""
    shared = [[{"from": {"user": "human"}.get(it["role"], "gpt"), "value": it["content"]} for it in it] for it in CHATS]
    rows: list[list[Any]] = [
        [{"messages": chat} for chat in CHATS],
        [{"conversations": chat} for chat in shared],
        [{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS],
    ]
    path = tmp_path / "a.jsonl"
    for lines in rows:
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        assert read_documents(str(path)) == CHATS
    tokenizer = with_beginning(tiny_tokenizer(TEMPLATE))
    splits = split_blocks(tokenizer, CHATS, length=24, samples=9)
    rendered = [tokenizer.apply_chat_template(CHATS[number], tokenize=False) for number in (3, 4)]
    for blocks, text in ((splits.selection, rendered[0]), (splits.report, rendered[1])):
        first = tokenizer(text, add_special_tokens=False)["input_ids"][:24]
        assert blocks[0].tolist() == first and first.count(tokenizer.eos_token_id) == 1
    for broken, message in (
        (tiny_tokenizer(), "no chat template"),
        (tiny_tokenizer("{{ nothing.at.all }}"), "does not take"),
    ):
        with pytest.raises(ValueError, match=message):
            split_blocks(broken, CHATS, length=24, samples=9)


def with_beginning(tokenizer: Any) -> Any:
    """As of Gemma and Llama, which put a token before each text."""
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.eos_token_id)]
    )
    return tokenizer


def test_samples_begin_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = with_beginning(tiny_tokenizer())
    assert text_beginning(tokenizer) == [tokenizer.eos_token_id] and text_beginning(tiny_tokenizer()) == []
    documents: list[Any] = [letter * 50 for letter in "abcdefghij"]
    begun = split_blocks(tokenizer, documents, length=16, samples=60)
    plain = split_blocks(tokenizer, documents, length=15, samples=60, add_special_tokens=False)
    for blocks, others in zip(vars(begun).values(), vars(plain).values(), strict=True):
        assert (blocks[:, 0] == tokenizer.eos_token_id).all() and (blocks[:, 1:] == others).all()
    assert begun.report[0].tolist() == tokenizer(documents[4])["input_ids"][:16]
    with pytest.raises(ValueError, match="--sequence-length must be above 1"):
        split_blocks(tokenizer, documents, length=1, samples=6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"content": "x"}', r"line 1 has no column .*of its columns \(content\), name one by --cal"),
        ("a.jsonl", '{"text": 5}', 'line 1, column "text" holds neither text nor a list of messages, but int'),
        ("a.jsonl", '{"messages": [{"content": "x"}]}', "line 1, column .* has a message without a role"),
        ("a.jsonl", '{"prompt": "x", "completion": []}', "a completion of different kinds"),
        ("a.json", '[{"text": "x"}', "a.json is not JSON"),
        ("a.json", "5", "holds no rows"),
        ("a.json", "[5]", "row 1 is no row with columns"),
        ("a.txt", b"caf\xe9", r"is not UTF-8 text \(byte 3\)"),
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "ended before"),
    ],
)
def test_reasons(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_documents(str(path))


def test_few_documents() -> None:
    """Each part gets one; with fewer there is nothing to judge by."""
    splits = split_blocks(tiny_tokenizer(), ["a" * 50, "b" * 50, "c" * 50], length=16, samples=9)
    assert [tiny_tokenizer().decode(blocks.flatten())[0] for blocks in vars(splits).values()] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="the text has 2 documents, and needs 3"):
        split_blocks(tiny_tokenizer(), ["a" * 50, "b" * 50], length=16, samples=9)


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
