"""The record of compiled kernels: what counts as a fault, what is compiled again, and that the page is the record's."""

import os
import subprocess
import sys

import pytest

from bench.kernels import TABLE, Unit, Usage, find_faults, read_record, readable, render, stale_units
from bench.revision import REPOSITORY


def test_faults() -> None:
    assert find_faults("k", 90, Usage(registers=255, spilled=0, shared=99 * 1024)) == []
    assert find_faults("k", 80, Usage(registers=255, spilled=8, shared=0)) == ["k spills 8 bytes on sm_80"]
    assert find_faults("k", 100, Usage(registers=255, spilled=8, shared=0)) == []
    [fault] = find_faults("k", 100, Usage(registers=1, spilled=0, shared=99 * 1024 + 1))
    assert "shared memory" in fault


def test_names_of_kernels() -> None:
    assert readable("score_chunks_parts") == "score_chunks_parts"
    anonymous = "_ZN10longshadow12_GLOBAL__N__17top_chunks_kernelILb0EEEvPKfPKiPijjj"
    assert readable(anonymous) == "top_chunks_kernel<Lb0E>"
    assert readable("_Z6kernelPf") == "kernel"


def test_changed_sources_are_stale() -> None:
    units = [Unit(name=name, source=name, compiled=None, minimum=80) for name in ("old", "changed", "new")]
    recorded = {"old": {"source": "old"}, "changed": {"source": "before"}}
    assert [unit.name for unit in stale_units(units, recorded)] == ["changed", "new"]


def test_the_page_shows_the_record() -> None:
    assert TABLE.read_text(encoding="utf-8") == render(read_record())


@pytest.mark.slow
def test_kernels_whose_sources_changed_still_compile() -> None:
    """In a process of its own, since kernels are interpreted in this one. It compiles nothing when nothing changed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(REPOSITORY / "src")
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels", "--check"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "compiled now" in done.stderr
