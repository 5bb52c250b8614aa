"""`longshadow compensate` from end to end on a tiny model, and one line for each mistake."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from longshadow.cli import app
from longshadow.compress.command import run_compensation
from longshadow.compress.evaluation import Variant, qualities
from longshadow.compress.options import CompensationOptions
from longshadow.compress.planning import layer_shapes
from longshadow.compress.shards import Shards
from tests.compress.test_pipeline import round_to_nearest, with_rounded_head
from tests.tiny_models import HIDDEN, TOKENS, tiny_model, tiny_tokenizer, write_folder


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
    variants = {"plain": Variant(model=round_to_nearest(tiny_model())), "adapted": Variant(model=loaded)}
    found = qualities(tiny_model(), variants, samples)
    assert found["adapted"].mean_divergence < found["plain"].mean_divergence


def test_progress_is_told(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Of blocks, and of samples while quality is measured."""
    options = CompensationOptions(rank=4, sequence_length=64, num_samples=9)
    steps: list[tuple[int, int, str, str]] = []
    original, quantized = map(str, models)
    run_compensation(
        original, quantized, tmp_path / "adapter", options, device="cpu", on_step=lambda *step: steps.append(step)
    )
    blocks = [(done, 2, "compensating", "layer") for done in (1, 2)]
    assert steps == blocks + [(done, 3, "measuring", "sample") for done in range(4)]


def test_a_bar_on_a_terminal(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    result = run(*models, tmp_path / "adapter", "--rank", "4", "--json")
    assert "compensating" in result.stderr and "measuring" in result.stderr
    assert "layer 0/?" in result.stderr and "sample 3/3" in result.stderr
    assert json.loads(result.stdout), "the bar does not go to stdout"


def test_the_head(models: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is planned for, and counted among what is compensated; where quantisation left it, a warning says so."""
    original = models[0]
    with_rounded_head(round_to_nearest(tiny_model())).save_pretrained(tmp_path / "quantized")
    tiny_tokenizer().save_pretrained(tmp_path / "quantized")
    bits = ("--budget-bpw", "12", "--uniform-rank", "--lm-head", "--json")
    planned = json.loads(run(original, tmp_path / "quantized", tmp_path / "dry", *bits, "--dry-run").stdout)
    report = json.loads(run(original, tmp_path / "quantized", tmp_path / "whole", *bits).stdout)
    num_weights = len(TOKENS) * HIDDEN + sum(m * n for m, n in layer_shapes(tiny_model()))
    assert "lm_head" in report["layers"] and not caplog.text
    assert report["bits_per_weight"] == pytest.approx(8 * report["adapter_bytes"] / num_weights)
    assert report["bits_per_weight"] <= 12 and report["adapter_bytes"] <= planned["adapter"] == num_weights * 12 // 8
    left = json.loads(run(*models, tmp_path / "left", *bits).stdout)
    assert "lm_head" not in left["layers"] and left["bits_per_weight"] <= 12
    assert "--lm-head: " in caplog.text and "which is left as it is" in caplog.text


def test_files_for_people(models: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    output = tmp_path / "adapter"
    assert run(*models, output, "--rank", "8").exit_code == 0
    assert (output / "error_per_layer.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "model.layers.1.mlp.down_proj" in page
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card and "--max-lora-rank 8" in card
    assert "- method: fisher, shrinkage 0.5" in card
    assert not list(tmp_path.glob(".*"))


def test_without_matplotlib_the_plot_alone_is_missing(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(*models, tmp_path / "adapter", "--rank", "4").exit_code == 0
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "report.html" in names and "error_per_layer.png" not in names
    assert "<img" not in (tmp_path / "adapter" / "report.html").read_text(encoding="utf-8")


def test_the_best_method_is_chosen_on_text_set_aside(models: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(*models, tmp_path / "adapter", "--rank", "8", "--method", "best", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["selection"].keys() == {"eora", "diagonal", "svd", "fisher"}
    assert report["method"] == min(report["selection"], key=report["selection"].__getitem__)
    single = run(*models, tmp_path / "single", "--rank", "8", "--method", report["method"], "--json")
    assert json.loads(single.stdout)["layers"] == report["layers"]


def test_an_original_on_disk(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Where memory does not hold both models; the factors are the same."""
    whole = run(*models, tmp_path / "whole", "--rank", "8", "--json")
    needed = json.loads(run(*models, tmp_path / "dry", "--dry-run", "--json", "--max-memory", "1GB").stdout)
    assert not needed["original_on_disk"]
    limit = needed["memory"] - needed["original"] // 3
    plan = run(*models, tmp_path / "dry", "--dry-run", "--json", "--max-memory", str(limit))
    assert json.loads(plan.stdout)["original_on_disk"], plan.stderr
    result = run(*models, tmp_path / "disk", "--rank", "8", "--max-memory", str(limit), "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["layers"] == json.loads(whole.stdout)["layers"]
    assert not (tmp_path / "dry").exists()
    fisher = [
        run(*models, tmp_path / name, "--method", "fisher", "--json", *given)
        for name, given in (("fisher", ()), ("fisher on disk", ("--max-memory", str(limit))))
    ]
    first, second = (json.loads(found.stdout)["layers"] for found in fisher)
    assert first == second


def test_a_run_that_was_stopped_goes_on(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(*models, tmp_path / "whole", "--rank", "8", "--json")
    saved = Shards.save

    def stop(self: Shards, *given: Any) -> None:
        saved(self, *given)
        raise KeyboardInterrupt

    monkeypatch.setattr(Shards, "save", stop)
    stopped = run(*models, tmp_path / "adapter", "--rank", "8")
    assert stopped.exit_code == 130 and "interrupted" in stopped.stderr
    monkeypatch.setattr(Shards, "save", saved)
    other = run(*models, tmp_path / "adapter", "--rank", "16")
    assert other.exit_code == 2 and "an unfinished run" in other.stderr
    again = run(*models, tmp_path / "adapter", "--rank", "8", "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout) == json.loads(whole.stdout)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_model_that_is_quantised_first(models: tuple[Path, Path], tmp_path: Path) -> None:
    """What cannot be done is said before anything is made, and the same command can be given again."""
    original = models[0]
    short = run(original, tmp_path / "pruned", tmp_path / "adapter", "--quantize", "2:4", "--max-memory", "10kB")
    assert short.exit_code == 2 and not list(tmp_path.iterdir())
    for name in ("first", "second"):
        result = run(original, tmp_path / "pruned", tmp_path / name, "--quantize", "2:4", "--rank", "4")
        assert result.exit_code == 0, result.stderr


def test_the_folder_that_it_runs_in(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    result = run(*models, Path("."), "--rank", "4")
    monkeypatch.chdir(tmp_path)
    assert result.exit_code == 0, result.stderr
    assert (here / "adapter_model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_dry_run_writes_nothing(models: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(*models, tmp_path / "adapter", "--dry-run")
    assert result.exit_code == 0 and "memory in all" in result.stdout, result.stderr
    assert not list(tmp_path.iterdir())


def test_a_data_set_in_place_of_a_file(models: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra train")
    (tmp_path / "texts").mkdir()
    lines = [json.dumps({"text": f"{number} tall ships and a star to steer them by. " * 20}) for number in range(20)]
    (tmp_path / "texts" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    result = run(*models, tmp_path / "adapter", "--rank", "4", "--calibration", f"hf:{tmp_path / 'texts'}")
    assert result.exit_code == 0, result.stderr
    missing = run(*models, tmp_path / "other", "--calibration", f"hf:{tmp_path / 'nowhere'}")
    assert missing.exit_code == 2 and "cannot read the data set" in missing.stderr


def test_the_table(models: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(*models, tmp_path / "adapter", "--budget-mb", "0.02")
    assert result.exit_code == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert "down_proj" in shown and "The adapter removes" in shown and "report.html" in shown


def test_mistakes(models: tuple[Path, Path], tmp_path: Path) -> None:
    original, quantized = models
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}", encoding="utf-8")
    cases = [
        (run(original, quantized, tmp_path / "full"), "holds something already"),
        (run(original, quantized, tmp_path / "a", "--rank", "0"), "--rank must be at least 1"),
        (run(original, quantized, tmp_path / "a", "--rank", "8", "--budget-mb", "1"), "not both"),
        (run(original, quantized, tmp_path / "a", "--max-memory", "10kB"), "are allowed"),
        (run(original, quantized, tmp_path / "a", "--max-memory", "much"), "must look like 8GB"),
        (run(original, quantized, tmp_path / "a", "--quantize", "int9:g1"), "--quantize takes"),
        (run(original, quantized, tmp_path / "a", "--quantize", "int9:g1", "--dry-run"), "--quantize takes"),
        (run(tmp_path / "lora", quantized, tmp_path / "a"), "is a LoRA adapter"),
        (run(original, quantized, tmp_path / "a", "--budget-mb", "0.0001"), "too small"),
        (run(original, quantized, tmp_path / "a", "--calibration", "nowhere.txt"), "cannot read"),
        (run(original, quantized, tmp_path / "a", "--sequence-length", "100000"), "fewer than one sample"),
        (run(original, original, tmp_path / "a"), "nothing to compensate"),
        (run(original, tmp_path / "missing", tmp_path / "a"), "missing"),
    ]
    for result, message in cases:
        assert result.exit_code == 2 and result.stdout == "", result.stdout
        [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert message in line
    assert {path.name for path in tmp_path.iterdir()} == {"full", "lora"}
