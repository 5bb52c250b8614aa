"""Which code is being measured: from git, or told by hand where there is no git."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path

from bench.record import Revision

REPOSITORY = Path(__file__).resolve().parent.parent
# What a benchmark run itself writes must not make the next run of the same code look dirty.
WRITTEN_BY_RUNS = ("bench/results", "bench/RESULTS.md")

DECIDING_SOURCES = (
    "engine/**/*.py",
    "compress/**/*.py",
    "bench/**/*.py",
    "src/longshadow/linears.py",
    "src/longshadow/model_sources.py",
    "src/longshadow/models.py",
    "src/longshadow/gguf_files.py",
)


def _git(*arguments: str, repository: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=repository, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def current_revision(*, commit: str | None, environment: Mapping[str, str], repository: Path = REPOSITORY) -> Revision:
    """The revision of `repository`, or `commit` (or COMMIT of `environment`) where git cannot tell.

    A commit given by hand is believed: it is meant for machines that hold an export of a clean checkout.
    Without git and without a commit the revision is "unknown" and counts as dirty.
    """
    head = _git("rev-parse", "HEAD", repository=repository)
    if head is None:
        told = commit or environment.get("COMMIT")
        return Revision(commit=told or "unknown", branch=None, dirty=told is None)
    excluded = [f":(exclude){path}" for path in WRITTEN_BY_RUNS]
    changes = _git("status", "--porcelain", "--", ".", *excluded, repository=repository)
    branch = _git("rev-parse", "--abbrev-ref", "HEAD", repository=repository)
    return Revision(commit=head, branch=branch, dirty=changes != "")


def source_hash(repository: Path = REPOSITORY) -> str:
    """A hash of the sources that decide a table's numbers; rows cached under another hash are stale."""
    digest = hashlib.sha256()
    for pattern in DECIDING_SOURCES:
        for path in sorted(repository.glob(pattern)):
            digest.update(str(path.relative_to(repository)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
