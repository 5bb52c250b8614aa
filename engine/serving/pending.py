"""Texts that were taken in, but are not saved as documents yet: a file each, with which a killed server goes on."""

import errno
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longshadow.engine.runtime.durable import sync_folder, written_whole
from longshadow.engine.serving.errors import ApiError

ID_PATTERN = re.compile(r"doc-[0-9a-f]{24}")
SUFFIX = ".pending.json"
FORMAT = "longshadow text"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PendingText:
    """A text that is to be read."""

    id: str
    name: str | None
    created: int
    text: str


class PendingTexts:
    """Those of one server.

    Args:
        folder: where they are; None: they are not kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def keep(self, pending: PendingText) -> None:
        """Writes a text; on return it is on the disk.

        Raises:
            ApiError: it cannot be written.
        """
        if self._folder is None:
            return
        fields = {"format": FORMAT, "name": pending.name, "created": pending.created, "sha256": _digest(pending.text)}
        try:
            with written_whole(self._path(pending.id)) as temporary, open(temporary, "w", encoding="utf-8") as file:
                json.dump({**fields, "text": pending.text}, file, ensure_ascii=False)
        except OSError as error:
            reason = error.strerror or str(error)
            logger.warning("a document cannot be kept in %s: %s", self._folder, reason)
            status, code = (507, "no_space") if error.errno in NO_SPACE else (503, "cannot_be_kept")
            message = f"the document was not taken: this server cannot write to its folder of documents ({reason})"
            raise ApiError(status, message, kind="service_unavailable_error", code=code) from error

    def forget(self, identity: str) -> None:
        """Removes a text, if there is one. Raises OSError."""
        if self._folder is None:
            return
        path = self._path(identity)
        if path.exists():
            path.unlink(missing_ok=True)
            sync_folder(self._folder)

    def found(self) -> Iterator[PendingText]:
        """Finds texts that an earlier server left, oldest first; a file that is damaged is left alone and told of."""
        found = []
        for path in sorted(self._folder.glob(f"*{SUFFIX}")) if self._folder is not None else ():
            try:
                found.append(_read(path))
            except (OSError, ValueError, RecursionError) as error:
                logger.warning("%s cannot be read: %s", path, " ".join(str(error).split()))
        yield from sorted(found, key=lambda pending: pending.created)

    def _path(self, identity: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{identity}{SUFFIX}"


def _read(path: Path) -> PendingText:
    identity = path.name.removesuffix(SUFFIX)
    fields: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict) or fields.get("format") != FORMAT or not ID_PATTERN.fullmatch(identity):
        raise ValueError("it was not written by this server")
    name, created, text = fields.get("name"), fields.get("created"), fields.get("text")
    if not isinstance(text, str) or not isinstance(created, int) or not isinstance(name, str | None):
        raise ValueError("it is damaged, a field is missing")
    if fields.get("sha256") != _digest(text):
        raise ValueError("it is damaged, its checksum differs")
    return PendingText(id=identity, name=name, created=created, text=text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
