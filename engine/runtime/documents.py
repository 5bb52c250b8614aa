"""A document that has been read once: its segments serve any number of requests."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from longshadow.engine.runtime.memory import Bytes
from longshadow.engine.runtime.state import SequenceState
from longshadow.engine.shadowkv.memory import MemoryReport

Writer = Callable[["Document", Path], None]


def new_document_id() -> str:
    """One that no other document has."""
    return f"doc-{secrets.token_hex(12)}"


@dataclass(eq=False, kw_only=True)
class Document:
    """Made by `LLM.add_document` or `LLM.load_document`; belongs to that engine.

    Attributes:
        id: unique in the engine, and kept when it is saved and loaded.
        name: what its owner calls it.
        num_tokens: its length.
        memory: what its segments and recent tokens take.
        full_cache_bytes: what a stock cache would take.
        state: its tokens; requests go on from copies that share the segments.
        reserved: what it holds of the engine's memory.
        num_users: requests that share it now.
        is_removed: no more requests may take it; its memory is given back with the last user.
    """

    name: str | None
    num_tokens: int
    memory: MemoryReport
    full_cache_bytes: int
    state: SequenceState = field(repr=False)
    reserved: Bytes = field(repr=False)
    writer: Writer = field(repr=False)
    id: str = field(default_factory=new_document_id)
    num_users: int = field(default=0, repr=False)
    is_removed: bool = field(default=False, repr=False)

    def save(self, path: str | Path) -> None:
        """Writes it as safetensors, whole or not at all.

        Raises:
            DocumentError: in one line, why it cannot be written; a file that was there is as it was.
        """
        self.writer(self, Path(path).expanduser())
