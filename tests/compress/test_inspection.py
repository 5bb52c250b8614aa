"""A quantised model beside its original, from the command line."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from longshadow.cli import app
from longshadow.compress.inspection import captured
from tests.compress.test_pipeline import round_to_nearest
from tests.tiny_models import tiny_model, tiny_tokenizer, write_folder


def test_residuals_and_formats(tmp_path: Path) -> None:
    original = write_folder(tmp_path / "original")
    quantized = round_to_nearest(tiny_model())
    quantized.save_pretrained(tmp_path / "quantized")
    tiny_tokenizer().save_pretrained(tmp_path / "quantized")
    command = ["adapter", "inspect", str(tmp_path / "quantized"), "--original", str(original), "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--json"])
    layers = json.loads(result.stdout)
    assert len(layers) == 14
    name = "model.layers.1.mlp.up_proj"
    weight, other = (model.get_submodule(name).weight.detach() for model in (tiny_model(), quantized))
    assert layers[name]["format"] == "dense"
    assert layers[name]["residual"] == pytest.approx(float((weight - other).norm() / weight.norm()), rel=1e-4)
    values = torch.linalg.svdvals((weight - other).double()).square()
    assert layers[name]["captured"]["16"] == pytest.approx(float(values[:16].sum() / values.sum()), rel=1e-5)
    assert "down_proj" in CliRunner().invoke(app, command).stdout


def test_mistakes(tmp_path: Path) -> None:
    original = write_folder(tmp_path / "original")
    result = CliRunner().invoke(app, ["adapter", "inspect", str(original)])
    assert result.exit_code == 2 and "--original" in result.stderr


def test_shares_of_energy() -> None:
    assert captured(torch.eye(64, 80)) == {16: pytest.approx(0.25), 32: pytest.approx(0.5), 64: pytest.approx(1.0)}
    assert captured(torch.zeros(3, 4)) == {16: 0, 32: 0, 64: 0}
