"""Text to calibrate on, as token blocks of equal length, split by document so that no part judges itself."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BUILTIN = "builtin"
HUB = "hf:"
# Of a data set on the hub, which may be endless, as much as the longest calibrations need.
HUB_CHARACTERS = 20_000_000
# Of five documents in a row: three calibrate, one chooses between settings, one is for the report.
PARTS = ("calibration", "calibration", "calibration", "selection", "report")


@dataclass(frozen=True, eq=False, kw_only=True)
class Splits:
    """Token blocks [samples, length] of each part."""

    calibration: torch.Tensor
    selection: torch.Tensor
    report: torch.Tensor

    def to(self, device: torch.device | str) -> "Splits":
        """The same on another device."""
        return Splits(**{name: blocks.to(device) for name, blocks in vars(self).items()})


def read_documents(source: str) -> list[str]:
    """Documents of FILE.jsonl (column text), of FILE.txt (paragraphs), of a data set on the Hugging Face hub
    ("hf:NAME" or "hf:NAME:CONFIGURATION", its split train, column text), or those that ship with Python ("builtin").

    Raises ValueError for a file that cannot be read, is empty, or lacks the column, with the line, and for a data set
    without a name, or that cannot be read.
    """
    if source == BUILTIN:
        from pydoc_data.topics import topics

        return [text for _, text in sorted(topics.items())]
    if source.startswith(HUB):
        return _hub_documents(source.removeprefix(HUB))
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the calibration text {source}: {error}") from None
    if path.suffix == ".jsonl":
        documents = [
            _document(line, f"{source}, line {number}")
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip()
        ]
    else:
        documents = text.split("\n\n")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"the calibration text {source} is empty")
    return documents


def _hub_documents(name: str) -> list[str]:
    name, _, configuration = name.partition(":")
    if not name:
        raise ValueError(f"{HUB} names no data set: give {HUB}NAME or {HUB}NAME:CONFIGURATION")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{HUB}{name} needs the package datasets: pip install 'longshadow[train]'") from error
    documents: list[str] = []
    left = HUB_CHARACTERS
    try:
        for row in load_dataset(name, configuration or None, split="train", streaming=True):
            documents.append(row["text"])
            left -= len(documents[-1])
            if left < 0:
                break
    except KeyError:
        raise ValueError(f'the data set {name} has no column "text"') from None
    # The library raises many kinds of errors for a name that is not there.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read the data set {name}: {reason}") from error
    return documents


def _document(line: str, place: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        raise ValueError(f"{place} is not JSON") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ValueError(f'{place} has no column "text"')
    return str(entry["text"])


def split_blocks(tokenizer: Any, documents: list[str], *, length: int, samples: int) -> Splits:
    """Documents dealt out to the parts, each part's text packed end to end into blocks of `length` tokens.

    Calibration has at most `samples` blocks, the other parts at most a third as many.

    Raises ValueError where a part does not fill one block.
    """
    texts: dict[str, list[str]] = {part: [] for part in PARTS}
    for number, document in enumerate(documents):
        texts[PARTS[number % len(PARTS)]].append(document)
    limits = {"calibration": samples, "selection": max(1, samples // 3), "report": max(1, samples // 3)}
    blocks = {}
    for part, limit in limits.items():
        tokens = tokenizer("\n\n".join(texts[part]), add_special_tokens=False)["input_ids"]
        count = min(limit, len(tokens) // length)
        if count == 0:
            raise ValueError(
                f"the {part} part of the text has {len(tokens):,} tokens, fewer than one sample of {length:,}: give "
                "more text, or a smaller --sequence-length"
            )
        blocks[part] = torch.tensor(tokens[: count * length]).view(count, length)
    return Splits(**blocks)
