"""What an adapter is worth, against the evaluation of compensate itself and a rounding of the same size."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from longshadow.cli import app
from longshadow.compress.adapters.evaluation import EvaluationText, evaluate_on_text, load_subject
from longshadow.compress.calibration import read_documents
from longshadow.compress.command import run_compensation
from longshadow.compress.options import CompensationOptions
from tests.compress.test_pipeline import round_to_nearest
from tests.tiny_models import tiny_model, tiny_tokenizer, write_folder

TEXT = EvaluationText(documents=read_documents("builtin"), length=64, num_samples=9)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with original, quantized and adapter, and the report of the run that made it."""
    folder = tmp_path_factory.mktemp("run")
    write_folder(folder / "original")
    round_to_nearest(tiny_model()).save_pretrained(folder / "quantized")
    tiny_tokenizer().save_pretrained(folder / "quantized")
    options = CompensationOptions(rank=8, sequence_length=TEXT.length, num_samples=TEXT.num_samples)
    names = (str(folder / name) for name in ("original", "quantized"))
    return folder, run_compensation(*names, folder / "adapter", options, device="cpu")


def test_it_finds_what_compensate_found(run: tuple[Path, dict[str, Any]]) -> None:
    folder, report = run
    names = (str(folder / name) for name in ("original", "quantized"))
    subject = load_subject(folder / "adapter", *names, bits_per_weight=4.0, device="cpu")
    counted: list[tuple[int, int]] = []
    found = evaluate_on_text(subject, TEXT, on_sample=lambda *count: counted.append(count))
    assert counted == [(done, 3) for done in range(4)]
    for name, other in (("original", "original"), ("quantised", "quantized"), ("with the adapter", "compensated")):
        assert found["rows"][name] == pytest.approx(report["report"][other], rel=1e-6)
    assert found["removed_by_adapter"] == pytest.approx(report["report"]["divergence_removed"], rel=1e-6)
    # Rank 8 of layers of 32 x 32 and 64 x 32 in bf16 is 6 to 8 bits per weight more, nearly 11 in all.
    assert found["bits_per_weight"]["adapter"] == pytest.approx(report["bits_per_weight"])
    assert found["rounding"]["bits_per_weight"] <= 4 + found["bits_per_weight"]["adapter"]
    rounded = found["rows"]["same bytes as bits"]["divergence"]
    over = found["adapter_over_rounding"]
    assert over["mean"] == pytest.approx(rounded - found["rows"]["with the adapter"]["divergence"])
    assert over["high"] < 0  # that many bits are the better buy


def test_without_a_size_there_is_no_rounding(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    command = [
        "adapter",
        "evaluate",
        str(folder / "adapter"),
        "--original",
        str(folder / "original"),
        "--device",
        "cpu",
    ]
    command += ["--quantized", str(folder / "quantized"), "--sequence-length", "64", "--num-samples", "9"]
    told = CliRunner().invoke(app, [*command, "--json"])
    assert "rounding" not in json.loads(told.stdout), told.stderr
    terminal = {"TTY_COMPATIBLE": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    shown = CliRunner(env=terminal).invoke(app, command)
    assert "measuring" in shown.stderr and "sample 3/3" in shown.stderr
    assert "give --bits-per-weight" in shown.stdout and "the adapter takes away" in shown.stdout
    assert "95 % between" in shown.stdout
    one = CliRunner(env=terminal).invoke(app, [*command[:-1], "3"])
    assert "(one sample, which has no interval)" in one.stdout and "95 %" not in one.stdout


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--sequence-length", "0", "at least 2"),
        ("--sequence-length", "1", "at least 2"),
        ("--num-samples", "0", "at least 1"),
        ("--num-samples", "-5", "at least 1"),
        ("--bits-per-weight", "-3", "above 0 and at most 32"),
        ("--bits-per-weight", "0", "above 0 and at most 32"),
        ("--bits-per-weight", "nan", "above 0 and at most 32"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, option: str, value: str, allowed: str) -> None:
    """They are refused before anything is looked for: neither the adapter nor a model is there."""
    missing = [str(tmp_path / "none"), "--original", str(tmp_path / "none"), "--quantized", str(tmp_path / "none")]
    result = CliRunner().invoke(app, ["adapter", "evaluate", *missing, option, value])
    assert result.exit_code == 2 and f"error: {option} must be {allowed}, got {value}" in result.stderr


def test_another_models_adapter_is_refused(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    with pytest.raises(ValueError, match="is for another model"):
        load_subject(folder / "adapter", "demo", "demo", device="cpu")
