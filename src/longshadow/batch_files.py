"""Files of batch inference: prompts in JSON lines, results appended a whole line at a time. Nothing heavy is imported.

A run that was stopped goes on where it was: a line whose result is there is not asked again.
"""

import hashlib
import json
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from longshadow.paths import check_output_file


@dataclass(frozen=True, kw_only=True)
class Task:
    """One line of the input.

    Attributes:
        line: its number, from 1.
        key: identifies its text and the settings it is run with.
        content: its JSON, whatever that is; None when it is none, for `reason`.
    """

    line: int
    key: str
    content: Any
    reason: str | None = None


def read_tasks(path: Path, settings: dict[str, Any]) -> Iterator[Task]:
    """The lines of a UTF-8 file that are not empty. Raises ValueError where it cannot be read."""
    salt = json.dumps(settings, sort_keys=True).encode()
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                key = hashlib.sha256(salt + raw.strip()).hexdigest()[:16]
                try:
                    yield Task(line=number, key=key, content=json.loads(raw))
                except (ValueError, RecursionError) as error:
                    yield Task(line=number, key=key, content=None, reason=f"the line is no JSON ({error})")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


class Results:
    """The output file, open for appending, and which tasks it has results of. One process at a time has it."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a file that holds something else, or that another process writes."""
        from filelock import FileLock, Timeout

        self._path = path = check_output_file(path, "--output")
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(f"another process writes {path}; wait for it, or choose another --output") from error
        try:
            self.done = self._read()
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def _read(self) -> dict[int, str]:
        """Line -> key of each result; cuts off what an interrupted write has left at the end."""
        if not self._path.exists():
            return {}
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        done: dict[int, str] = {}
        for number, raw in enumerate(whole.splitlines(), 1):
            try:
                result = json.loads(raw)
                done[operator.index(result["line"])] = str(result["key"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{self._path} holds something else (line {number}); choose another --output"
                ) from error
        if not whole and content.strip() and not content.startswith(b'{"line": '):
            raise ValueError(f"{self._path} holds something else; choose another --output")
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))
        return done

    def has(self, task: Task) -> bool:
        """Whether the task's result is there. Raises ValueError when that of another text or other settings is."""
        key = self.done.get(task.line)
        if key is not None and key != task.key:
            raise ValueError(
                f"{self._path} has a result for line {task.line} that is of another input or of other settings; "
                "choose another --output"
            )
        return key is not None

    def append(self, task: Task, result: dict[str, Any]) -> None:
        """Writes a result, on the disk when this returns."""
        fields = {"line": task.line, "key": task.key, **result}
        try:
            line = json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, in an id: escaped, as it came
            line = json.dumps(fields).encode()
        left = memoryview(line + b"\n")
        while left:
            left = left[os.write(self._file, left) :]
        os.fsync(self._file)
        self.done[task.line] = task.key
