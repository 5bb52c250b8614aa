from pathlib import Path
from typing import Any

import pytest
import torch

from longshadow.engine.runtime import memory
from longshadow.engine.runtime.memory import Bytes, MemoryBudget


@pytest.mark.parametrize("place", ["device_memory", "host_memory"])
@pytest.mark.parametrize("text", ["", "0", "101%", "-1", "8X", 0, True, 1.5, "8G%", "inf", "nan%"])
def test_refuses_malformed_limits_by_name(place: str, text: str | int) -> None:
    limits: dict[str, Any] = {"device_memory": "50%", "host_memory": "50%", place: text}
    with pytest.raises(ValueError, match=f"{place} must be"):
        MemoryBudget.of(torch.device("cpu"), **limits)


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
