"""From a document and a question to token ids that fit the model."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def read_document(source: str) -> str:
    """The text of a UTF-8 file, or of standard input for `-`.

    Raises:
        ValueError: it cannot be read, is not UTF-8, or holds no text.
    """
    name = "standard input" if source == "-" else source
    try:
        content = _standard_input() if source == "-" else Path(os.path.expanduser(source)).read_bytes()
        document = content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read the prompt file {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the prompt file {name} is not UTF-8 text (byte {error.start:,}); convert it with iconv"
        ) from error
    if "\0" in document:
        raise ValueError(f"the prompt file {name} is not text: it holds zero bytes")
    if not document.strip():
        raise ValueError(f"the prompt file {name} is empty; put the document to read into it")
    return document


def _standard_input() -> bytes:
    if sys.stdin is None or getattr(sys.stdin, "closed", False):
        raise OSError("it is closed; pipe a text into it")
    if sys.stdin.isatty():
        raise OSError("it is a terminal; pipe a text into it, or name a file")
    return sys.stdin.buffer.read()


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", document: str, question: str | None) -> "torch.Tensor":
    """Token ids [1, n] of a document and a question: one user message where there is a chat template."""
    import torch

    from longshadow.engine.runtime.chat import encode_chat
    from longshadow.engine.runtime.control_tokens import ControlTokens

    content = f"{document.strip()}\n\n{question}" if question else document.strip()
    if tokenizer.chat_template:
        tokens = encode_chat(tokenizer, [{"role": "user", "content": content}], after_document=False)
    else:
        tokens = ControlTokens(tokenizer).encode_text(content)
    return torch.tensor([tokens])


def room_for_new_tokens(prompt_tokens: int, max_positions: int | None, wanted: int) -> int:
    """How many of the wanted new tokens the model's positions allow after the prompt.

    Raises:
        ValueError: the prompt leaves no room for a single token.
    """
    if max_positions is None:
        return wanted
    if prompt_tokens >= max_positions:
        raise ValueError(
            f"the prompt has {prompt_tokens:,} tokens, but the model has {max_positions:,} positions "
            "(prompt and answer together); shorten the prompt or take a model for longer contexts"
        )
    return min(wanted, max_positions - prompt_tokens)
