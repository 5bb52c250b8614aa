"""Documents of a file or of rows: text, or chats that a template will turn into text.

Lines end at line feeds alone, since other characters that Python splits at, such as U+2028, may stand inside JSON.
"""

import codecs
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Chat = list[dict[str, Any]]
Document = str | Chat

GZIP = b"\x1f\x8b"
ROWS, ARRAY = (".jsonl", ".ndjson", ".jsonlines"), ".json"
TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# Of chats as other tools write them.
ROLES = {"human": "user", "gpt": "assistant"}
# A text with fewer paragraphs than that, and so many lines, has a document a line.
FEW_PARAGRAPHS, MANY_LINES = 3, 5


def file_documents(path: Path, column: str | None = None) -> list[Document]:
    """Documents of a text file, of JSON lines or a JSON array, of CSV or of Parquet, all but Parquet also as .gz.

    A text file's documents are its paragraphs, or its lines where hardly any line is blank. Of rows, `column` is
    taken, or else what `row_document` finds.

    Raises ValueError, with the line or row, for what cannot be read.
    """
    kind = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if kind in TABLES:
        _require_readable(path)
        return [row_document(row, place, column) for place, row in _table_rows(path, TABLES[kind])]
    text = _text_of(path)
    if kind in ROWS:
        return list(_of_lines(text, path, column))
    if kind == ARRAY:
        return list(_of_json(text, path, column))
    paragraphs = [part for part in _paragraphs(text) if part.strip()]
    lines = [line for line in text.split("\n") if line.strip()]
    is_in_lines = len(paragraphs) < FEW_PARAGRAPHS and len(lines) >= MANY_LINES
    return [*(lines if is_in_lines else paragraphs)]


def row_document(row: Any, place: str, column: str | None = None) -> Document:
    """The document of a row: its text, its messages, or its prompt with its completion; or the column that is named.

    Raises ValueError for a row without any of them.
    """
    if isinstance(row, str) and column is None:
        return whole_characters(row)
    if not isinstance(row, dict):
        raise ValueError(f"{place} is no row with columns")
    if column is not None:
        if column not in row:
            raise ValueError(f'{place} has no column "{column}"{_columns_of(row)}')
        return _value(row[column], f'{place}, column "{column}"')
    for name in ("text", "messages", "conversations"):
        if name in row:
            return _value(row[name], f'{place}, column "{name}"')
    if "prompt" in row and "completion" in row:
        prompt, completion = (_value(row[name], f'{place}, column "{name}"') for name in ("prompt", "completion"))
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        if isinstance(prompt, list) and isinstance(completion, list):
            return prompt + completion
        raise ValueError(f"{place} has a prompt and a completion of different kinds: give text or messages for both")
    raise ValueError(f'{place} has no column "text", no messages, and no prompt with a completion{_columns_of(row)}')


def whole_characters(text: str) -> str:
    """The text with U+FFFD for halves of characters, which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _value(value: Any, place: str) -> Document:
    if value is None:
        return ""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return [_message(message, place) for message in value]
    raise ValueError(f"{place} holds neither text nor a list of messages, but {type(value).__name__}")


def _message(message: dict[str, Any], place: str) -> dict[str, Any]:
    if "from" in message and "value" in message:
        message = {"role": ROLES.get(message["from"], message["from"]), "content": message["value"]}
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{place} has a message without a role")
    return {key: whole_characters(value) if isinstance(value, str) else value for key, value in message.items()}


def _columns_of(row: dict[str, Any]) -> str:
    names = ", ".join(map(str, row))
    return f"; of its columns ({names}), name one by --calibration-column" if names else ""


def _of_lines(text: str, path: Path, column: str | None) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                raise ValueError(f"{place} is not JSON") from None
            yield row_document(row, place, column)


def _of_json(text: str, path: Path, column: str | None) -> Iterator[Document]:
    """Of an array of rows, of an object with one, or of rows in lines, whatever the file's name says."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if "\n" in text.strip() and not text.lstrip().startswith("["):
            yield from _of_lines(text, path, column)
            return
        raise ValueError(f"{path} is not JSON (line {error.lineno})") from None
    if isinstance(found, dict):
        arrays = [value for value in found.values() if isinstance(value, list)]
        is_row = column in found or "text" in found or "messages" in found or len(arrays) != 1
        found = [found] if is_row else arrays[0]
    if not isinstance(found, list):
        raise ValueError(f"{path} holds no rows: give an array of them, or one a line")
    for number, row in enumerate(found, 1):
        yield row_document(row, f"{path}, row {number}", column)


def _table_rows(path: Path, kind: str) -> Iterable[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{path} needs the package datasets: pip install 'longshadow[train]'") from error
    options: dict[str, Any] = {"sep": "\t"} if ".tsv" in path.suffixes else {}
    try:
        rows = list(load_dataset(kind, data_files=str(path), split="train", streaming=True, **options))
    # Its readers have an error of their own for each kind of damage.
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"cannot read {path} as {kind}: {str(cause).strip().split(chr(10))[0]}") from error
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


def _require_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ValueError(f"cannot read the calibration text {path}: {error.strerror or error}") from None


def _text_of(path: Path) -> str:
    """With line feeds for all ends of lines, and without a byte order mark."""
    try:
        content = path.read_bytes()
        if content.startswith(GZIP):
            content = gzip.decompress(content)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read the calibration text {path}: {reason}") from None
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"cannot read the calibration text {path}: it is not UTF-8 text (byte {error.start:,}); convert it with "
            "iconv"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _paragraphs(text: str) -> Iterator[str]:
    """Lines between blank ones, together."""
    lines: list[str] = []
    for line in (*text.split("\n"), ""):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []
