from pathlib import Path

import pytest

from longshadow.engine.runtime import memory
from longshadow.engine.runtime.memory import Bytes, MemoryBudget, parse_memory


@pytest.mark.parametrize(
    ("text", "expected"),
    [("50%", 500), ("100 %", 1000), ("8G", 8 * 2**30), ("1.5 MiB", 3 * 2**19), ("2kb", 2048), ("7", 7), (9, 9)],
)
def test_sizes_and_shares(text: str | int, expected: int) -> None:
    assert parse_memory("device_memory", text, 1000) == expected


@pytest.mark.parametrize("text", ["", "0", "101%", "-1", "8X", "G", 0, -5, True, 1.5, "1e9", "8G%"])
def test_refuses_others_by_name(text: str | int) -> None:
    with pytest.raises(ValueError, match="device_memory must be"):
        parse_memory("device_memory", text, 1000)


def test_pages_of_files_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000")
    (tmp_path / "memory.current").write_text("900")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 700\nactive_file 50\n")
    assert memory.available_main_memory() == 800
    (tmp_path / "memory.max").write_text("max")
    assert memory.available_main_memory() > 2**20


def test_on_a_cpu_both_places_share_the_device_limit() -> None:
    shared = MemoryBudget(device_limit=100, host_limit=60, shared=True)
    assert shared.fits(Bytes(device=50, host=50))
    assert not shared.fits(Bytes(device=51, host=50))
    assert not shared.fits(Bytes(host=61))
    apart = MemoryBudget(device_limit=100, host_limit=60, shared=False)
    assert apart.fits(Bytes(device=100, host=60))


def test_gives_back_no_more_than_was_taken() -> None:
    budget = MemoryBudget(device_limit=100, host_limit=60, shared=False)
    budget.reserve(Bytes(device=10, host=20))
    budget.release(Bytes(device=10, host=20))
    assert budget.reserved == Bytes()
    with pytest.raises(AssertionError):
        budget.release(Bytes(host=1))
    with pytest.raises(AssertionError):
        budget.reserve(Bytes(device=101))
