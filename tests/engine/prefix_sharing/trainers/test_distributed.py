"""Two processes over gloo train what one does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.prefix_sharing.trainers.distributed_run import RESULT, write_rows

ROOT = Path(__file__).resolve().parents[4]
MODULE = "tests.engine.prefix_sharing.trainers.distributed_run"


def train(folder: Path, kind: str, processes: int) -> dict[str, Any]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    if processes == 1:
        launcher = [sys.executable]
    done = subprocess.run(
        [*launcher, "-m", MODULE, str(folder), kind, str(processes)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result: dict[str, Any] = torch.load(folder / RESULT)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("distributed")
    write_rows(path, tokenizer)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return train(folder, "ddp", 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "packed"])
def test_two_processes_train_what_one_does(folder: Path, alone: dict[str, Any], kind: str) -> None:
    actual = train(folder, kind, 2)
    assert_same_weights(actual, alone)
    for mine, theirs in zip(actual["logged"], alone["logged"], strict=True):
        for key in ("loss", "rewards/margins", "logps/chosen"):
            assert abs(mine[key] - theirs[key]) <= 1e-4 * max(1, abs(theirs[key])), key
    assert all(entry["grad_norm"] > 1e-3 for entry in alone["logged"])


@pytest.mark.slow
def test_a_fully_sharded_model_shares_prefixes(folder: Path) -> None:
    expected = train(folder, "fsdp2", 1)
    assert_same_weights(train(folder, "fsdp2", 2), expected)
    losses = [entry["loss"] for entry in expected["logged"]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def assert_same_weights(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(actual["weights"][name], weight, rtol=0, atol=1e-5, msg=name)
