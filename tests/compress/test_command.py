"""`longshadow compensate` from end to end on a tiny model, and one line for each mistake."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from longshadow.cli import app
from longshadow.compress.evaluation import mean_and_interval, quality
from tests.compress.test_pipeline import round_to_nearest
from tests.tiny_models import tiny_model, tiny_tokenizer, write_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    original = write_folder(folder / "original")
    round_to_nearest(tiny_model()).save_pretrained(folder / "quantized")
    tiny_tokenizer().save_pretrained(folder / "quantized")
    return original, folder / "quantized"


def run(original: Path, quantized: Path, output: Path, *options: str) -> Result:
    command = ["compensate", str(original), "--quantized", str(quantized), "--output", str(output), "--device", "cpu"]
    return CliRunner().invoke(app, [*command, "--sequence-length", "64", "--num-samples", "9", *options])


def test_an_adapter_and_a_report(models: tuple[Path, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra train")
    output = tmp_path / "adapter"
    result = run(*models, output, "--rank", "8", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((output / "compensation_report.json").read_text(encoding="utf-8"))
    assert len(report["layers"]) == 14 and {layer["rank"] for layer in report["layers"].values()} == {8}
    measured = report["report"]
    assert measured["original"]["divergence"] == 0 < measured["compensated"]["divergence"]
    assert measured["compensated"]["divergence"] < measured["quantized"]["divergence"]
    assert 0 < measured["recovered"] < 1 and measured["divergence_removed"]["low"] > 0
    size = (output / "adapter_model.safetensors").stat().st_size
    assert report["adapter_bytes"] < size < 1.5 * report["adapter_bytes"] + 10_000
    loaded = peft.PeftModel.from_pretrained(round_to_nearest(tiny_model()), output)
    samples = torch.randint(100, (2, 64), generator=torch.Generator().manual_seed(0))
    plain = quality(tiny_model(), round_to_nearest(tiny_model()), samples).mean_divergence
    assert quality(tiny_model(), loaded, samples).mean_divergence < plain


def test_the_table(models: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(*models, tmp_path / "adapter", "--budget-mb", "0.02")
    assert result.exit_code == 0, result.stderr
    assert "down_proj" in result.stdout and "of the divergence removed" in result.stdout


def test_mistakes(models: tuple[Path, Path], tmp_path: Path) -> None:
    original, quantized = models
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cases = [
        (run(original, quantized, tmp_path / "full"), "holds something already"),
        (run(original, quantized, tmp_path / "a", "--rank", "0"), "--rank must be at least 1"),
        (run(original, quantized, tmp_path / "a", "--rank", "8", "--budget-mb", "1"), "not both"),
        (run(original, quantized, tmp_path / "a", "--budget-mb", "0.0001"), "too small"),
        (run(original, quantized, tmp_path / "a", "--calibration", "nowhere.txt"), "cannot read"),
        (run(original, quantized, tmp_path / "a", "--sequence-length", "10000000"), "fewer than one sample"),
        (run(original, original, tmp_path / "a"), "nothing to compensate"),
        (run(original, tmp_path / "missing", tmp_path / "a"), "missing"),
    ]
    for result, message in cases:
        assert result.exit_code == 2 and result.stdout == "", result.stdout
        [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert message in line
    assert not (tmp_path / "a").exists()


def test_intervals() -> None:
    assert mean_and_interval([2.0] * 5) == (2.0, 2.0, 2.0)
    generator = torch.Generator().manual_seed(0)
    mean, low, high = mean_and_interval(torch.randn(400, generator=generator).tolist())
    # The standard error of 400 draws is 0.05.
    assert low < mean < high and 0.15 < high - low < 0.25
