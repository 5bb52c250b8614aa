"""What `adapter evaluate --tasks` says before lm-eval runs, and what it makes of lm-eval's results."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longshadow.cli import app
from longshadow.compress.adapters.tasks import scores_of


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["arc_easy"], "pip install 'longshadow[eval]'"),
        ([" , "], "--tasks takes names of"),
        (["arc_easy", "--tasks-limit", "0"], "--tasks-limit must be at least 1, got 0"),
    ],
)
def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str) -> None:
    """They are found before the models are looked for."""
    for module in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, module, None)
    command = ["adapter", "evaluate", str(tmp_path), "--original", "nowhere", "--quantized", "nowhere", "--tasks"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 2 and result.stdout == ""
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


def test_scores() -> None:
    values = {
        "alias": "a task",
        "sample_len": 7,
        "acc,none": 0.5,
        "acc_stderr,none": 0.125,
        "exact_match,strict": 1,
        "exact_match_stderr,strict": "N/A",
    }
    assert scores_of(values) == {
        "acc": {"value": 0.5, "stderr": 0.125},
        "exact_match (strict)": {"value": 1.0, "stderr": None},
    }
