"""Interrupted runs go on where they were, bit for bit, and never with another run's pieces."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longshadow import compensate
from longshadow.compress.pipeline import Compensation
from longshadow.compress.shards import Shards
from tests.compress.test_pipeline import round_to_nearest
from tests.tiny_models import tiny_model


def assert_same(actual: Compensation, expected: Compensation) -> None:
    assert actual.layers.keys() == expected.layers.keys() and actual.factors.keys() == expected.factors.keys()
    for name, report in expected.layers.items():
        assert vars(actual.layers[name]) == vars(report)
    for name, factors in expected.factors.items():
        assert torch.equal(actual.factors[name].lora_a, factors.lora_a)
        assert torch.equal(actual.factors[name].lora_b, factors.lora_b)


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": None, "budget": 9000}, {"rank": 4, "head": True}])
def test_a_resumed_run_is_an_uninterrupted_one(
    samples: torch.Tensor, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tiny_model()
    quantized = round_to_nearest(original)
    expected = compensate(original, quantized, samples, **options)

    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        if done == total - 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        compensate(original, quantized, samples, shards=Shards(tmp_path / "work", "a"), on_block=interrupt, **options)
    kept = Shards(tmp_path / "work", "a")
    assert kept.load("block_00000") is not None
    assert_same(compensate(original, quantized, samples, shards=kept, **options), expected)
    # Finished blocks are not solved for again.
    monkeypatch.setattr("longshadow.compress.measure.solve", None)
    assert_same(compensate(original, quantized, samples, shards=kept, **options), expected)
    kept.discard()
    assert not (tmp_path / "work").exists()


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    Shards(tmp_path / "work", "a")
    with pytest.raises(ValueError, match="an unfinished run with other models"):
        Shards(tmp_path / "work", "b")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="an unfinished run with other models"):
        Shards(tmp_path / "mine", "b")
    (tmp_path / "work" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="an unfinished run with other models"):
        Shards(tmp_path / "work", "a")


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from longshadow.compress.shards import Shards
shards = Shards(Path(sys.argv[1]), "a")
shards.save("whole", {"tensor": torch.ones(3)}, {"facts": 1})
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
shards.save("half", {"tensor": torch.ones(3)}, {})
"""


def test_a_killed_write_leaves_nothing_half(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "work")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert killed.returncode == -signal.SIGKILL
    shards = Shards(tmp_path / "work", "a")
    tensors, facts = shards.load("whole") or ({}, None)
    assert torch.equal(tensors["tensor"], torch.ones(3)) and facts == {"facts": 1}
    assert shards.load("half") is None
