"""A quantised model beside its original, from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from longshadow.cli import app
from longshadow.compress.inspection import captured
from tests.compress.test_pipeline import round_to_nearest
from tests.tiny_models import tiny_model, tiny_tokenizer, write_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    round_to_nearest(tiny_model()).save_pretrained(folder / "quantized")
    tiny_tokenizer().save_pretrained(folder / "quantized")
    return write_folder(folder / "original"), folder / "quantized"


def inspect(original: Path, quantized: Path, *options: str, env: dict[str, str] | None = None) -> Result:
    command = ["adapter", "inspect", str(quantized), "--original", str(original), "--device", "cpu"]
    return CliRunner(env=env).invoke(app, [*command, *options])


def test_residuals_and_formats(models: tuple[Path, Path]) -> None:
    result = inspect(*models, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found["layers"]) == 14 and found["left_out"] is None
    name = "model.layers.1.mlp.up_proj"
    rounded = round_to_nearest(tiny_model())
    weight, other = (model.get_submodule(name).weight.detach() for model in (tiny_model(), rounded))
    layer = found["layers"][name]
    assert layer["format"] == "dense" and layer["scaled"] is False
    assert layer["residual"] == pytest.approx(float((weight - other).norm() / weight.norm()), rel=1e-4)
    values = torch.linalg.svdvals((weight - other).double()).square()
    assert layer["captured"]["16"] == pytest.approx(float(values[:16].sum() / values.sum()), rel=1e-5)


def test_what_a_compensation_would_take(models: tuple[Path, Path], tmp_path: Path) -> None:
    """As --dry-run of the same rank says."""
    found = json.loads(inspect(*models, "--json").stdout)["compensation"]
    assert list(found) == ["16", "32", "64"]
    command = ["compensate", str(models[0]), "--quantized", str(models[1]), "--output", str(tmp_path / "adapter")]
    dry = CliRunner().invoke(app, [*command, "--rank", "16", "--dry-run", "--json", "--device", "cpu"])
    told = json.loads(dry.stdout)
    for part in ("adapter", "memory", "states", "block"):
        assert found["16"][part] == told[part]
    # Layers of 32 inputs or outputs have no rank above 32.
    assert found["16"]["adapter"] < found["32"]["adapter"] == found["64"]["adapter"]
    assert found["16"]["seconds"] > 0


def test_an_original_that_stays_on_disk(models: tuple[Path, Path]) -> None:
    whole = json.loads(inspect(*models, "--json").stdout)
    limited = json.loads(inspect(*models, "--max-memory", "100kB", "--json").stdout)
    assert limited["layers"] == whole["layers"]
    assert limited["compensation"]["16"]["original_on_disk"] and not whole["compensation"]["16"]["original_on_disk"]


def test_memory_of_an_adapter_is_no_matter(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["adapter", "inspect", str(tmp_path), "--max-memory", "8GB"])
    assert result.exit_code == 2
    assert result.stderr.strip() == "error: --max-memory goes with --original: an adapter's own files are small"


def test_the_tables(models: tuple[Path, Path]) -> None:
    terminal = {"TTY_COMPATIBLE": "1", "NO_COLOR": "1", "COLUMNS": "100"}
    result = inspect(*models, env=terminal)
    assert "inspecting" in result.stderr and "layer 2/2" in result.stderr
    shown = result.stdout
    assert "down_proj" in shown and "a compensation of rank" in shown and " MB" in shown and " min" in shown


def test_folded_scales_are_taken_back(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Columns times s and the norm before them by s: the same function, whose weights look far away."""
    model = round_to_nearest(tiny_model())
    scale = torch.linspace(0.3, 3, model.config.hidden_size)
    with torch.no_grad():
        for block in model.model.layers:
            block.post_attention_layernorm.weight /= scale
            for layer in (block.mlp.gate_proj, block.mlp.up_proj):
                layer.weight *= scale
    model.save_pretrained(tmp_path / "folded")
    tiny_tokenizer().save_pretrained(tmp_path / "folded")
    plain, folded = (json.loads(inspect(models[0], it, "--json").stdout) for it in (models[1], tmp_path / "folded"))
    for name, layer in folded["layers"].items():
        assert layer["scaled"] is name.endswith(("gate_proj", "up_proj"))
        assert layer["residual"] == pytest.approx(plain["layers"][name]["residual"], rel=0.3)
    assert "4 layers have scales folded" in inspect(models[0], tmp_path / "folded").stdout


def test_mistakes(models: tuple[Path, Path], tmp_path: Path) -> None:
    other: Any = tiny_model()
    del other.model.layers[1]
    other.config.num_hidden_layers = 1
    other.save_pretrained(tmp_path / "shallow")
    tiny_tokenizer().save_pretrained(tmp_path / "shallow")
    for result, message in [
        (CliRunner().invoke(app, ["adapter", "inspect", str(models[0])]), "--original"),
        (inspect(models[0], tmp_path / "shallow"), "2 and 1 blocks"),
        (inspect(models[0], tmp_path / "none"), "there is no folder"),
    ]:
        [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.exit_code == 2 and message in line


def test_shares_of_energy() -> None:
    assert captured(torch.eye(64, 80)) == {16: pytest.approx(0.25), 32: pytest.approx(0.5), 64: pytest.approx(1.0)}
    assert captured(torch.zeros(3, 4)) == {16: 0, 32: 0, 64: 0}
