"""Text to calibrate on, as token blocks of equal length, split by document so that no part judges itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from longshadow.compress.documents import Document, file_documents, row_document

BUILTIN = "builtin"
HUB = "hf:"
# Of a data set on the hub, which may be endless, as much as the longest calibrations need.
HUB_CHARACTERS = 20_000_000
# Of five documents in a row: three calibrate, one chooses between settings, one is for the report.
PARTS = ("calibration", "calibration", "calibration", "selection", "report")
FEW_PARTS = ("calibration", "selection", "report", "calibration")


@dataclass(frozen=True, eq=False, kw_only=True)
class Splits:
    """Token blocks [samples, length] of each part."""

    calibration: torch.Tensor
    selection: torch.Tensor
    report: torch.Tensor

    def to(self, device: torch.device | str) -> "Splits":
        """The same on another device."""
        return Splits(**{name: blocks.to(device) for name, blocks in vars(self).items()})


def read_documents(source: str, *, column: str | None = None) -> list[Document]:
    """Documents of a file (`file_documents`), of a data set on the Hugging Face hub ("hf:NAME" or
    "hf:NAME:CONFIGURATION", its split train), or those that ship with Python ("builtin").

    Rows give their text, their messages, or their prompt with its completion, unless a `column` is named.

    Raises ValueError for a file that cannot be read, is empty, or lacks the column, with the
    line, and for a data set without a name, or that cannot be read.
    """
    if source == BUILTIN:
        from pydoc_data.topics import topics

        return [text for _, text in sorted(topics.items())]
    if source.startswith(HUB):
        return _hub_documents(source.removeprefix(HUB), column)
    documents = [document for document in file_documents(Path(source).expanduser(), column) if _says_anything(document)]
    if not documents:
        raise ValueError(f"the calibration text {source} is empty")
    return documents


def _says_anything(document: Document) -> bool:
    return bool(document.strip()) if isinstance(document, str) else bool(document)


def _hub_documents(name: str, column: str | None) -> list[Document]:
    name, _, configuration = name.partition(":")
    if not name:
        raise ValueError(f"{HUB} names no data set: give {HUB}NAME or {HUB}NAME:CONFIGURATION")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{HUB}{name} needs the package datasets: pip install 'longshadow[train]'") from error
    documents: list[Document] = []
    left = HUB_CHARACTERS
    try:
        rows = iter(load_dataset(name, configuration or None, split="train", streaming=True))
        while left >= 0 and (row := next(rows, None)) is not None:
            document = row_document(row, f"the data set {name}, row {len(documents) + 1}", column)
            documents.append(document)
            left -= len(str(document))
    except ValueError as error:
        if str(error).startswith("the data set"):
            raise
        raise ValueError(f"cannot read the data set {name}: {_first_line(error)}") from error
    # The library raises many kinds of errors for a name that is not there.
    except Exception as error:
        raise ValueError(f"cannot read the data set {name}: {_first_line(error)}") from error
    return list(filter(_says_anything, documents))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def split_blocks(
    tokenizer: Any, documents: Sequence[Document], *, length: int, samples: int, add_special_tokens: bool = True
) -> Splits:
    """Documents dealt out to the parts, each part's text packed end to end into blocks of `length` tokens.

    Calibration has at most `samples` blocks, the other parts at most a third as many. Each block begins as the
    tokenizer begins a text, with the token that some models expect there (BOS), unless `add_special_tokens` is False,
    or it begins so anyway, as chats from a template do.

    Raises ValueError for fewer documents than parts, where a part does not fill one block, and for chats without a
    template that takes them.
    """
    if len(documents) < len(set(PARTS)):
        raise ValueError(
            f"the text has {len(documents)} document{'s' * (len(documents) != 1)}, and needs {len(set(PARTS))}, to "
            "calibrate, to choose and to report on: part documents by blank lines, or give one a line"
        )
    order = PARTS if len(documents) >= len(PARTS) else FEW_PARTS
    texts: dict[str, list[Document]] = {part: [] for part in PARTS}
    for number, document in enumerate(documents):
        texts[order[number % len(order)]].append(document)
    beginning = text_beginning(tokenizer) if add_special_tokens else []
    if length <= len(beginning):
        raise ValueError(f"--sequence-length must be above {len(beginning)}, the tokens that begin a text")
    limits = {"calibration": samples, "selection": max(1, samples // 3), "report": max(1, samples // 3)}
    blocks = {}
    for part, limit in limits.items():
        tokens = _tokens(tokenizer, texts[part])
        packed = _packed(tokens, beginning, length, limit)
        if not packed:
            raise ValueError(
                f"the {part} part of the text has {len(tokens):,} tokens, fewer than one sample of {length:,}: give "
                "more text, or a smaller --sequence-length"
            )
        blocks[part] = torch.tensor(packed)
    return Splits(**blocks)


def text_beginning(tokenizer: Any) -> list[int]:
    """Ids of what the tokenizer puts before a text, such as BOS; most often none or one."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    places = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    return whole[: places[0]] if places else []


def _tokens(tokenizer: Any, documents: Sequence[Document]) -> list[int]:
    """Texts with a blank line between two, and chats as the template writes them."""
    tokens: list[int] = []
    for is_text, run in groupby(documents, lambda document: isinstance(document, str)):
        alike = list(run)
        texts = ["\n\n".join(map(str, alike))] if is_text else [_from_template(tokenizer, chat) for chat in alike]
        for text in texts:
            tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def _from_template(tokenizer: Any, chat: Document) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the calibration text has chats, and the model no chat template: give text")
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    # Templates raise what they like.
    except Exception as error:
        raise ValueError(f"the model's chat template does not take {str(chat)[:60]}… ({_first_line(error)})") from error


def _packed(tokens: list[int], beginning: list[int], length: int, limit: int) -> list[list[int]]:
    """At most `limit` blocks, each with that beginning, once."""
    blocks: list[list[int]] = []
    place = 0
    while len(blocks) < limit:
        start = [] if tokens[place : place + len(beginning)] == beginning else beginning
        block = start + tokens[place : place + length - len(start)]
        if len(block) < length:
            break
        blocks.append(block)
        place += length - len(start)
    return blocks
