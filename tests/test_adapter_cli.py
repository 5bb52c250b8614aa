"""`longshadow adapter` and `generate --adapter`: what is printed, exit codes, one line per mistake."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from longshadow.cli import app
from longshadow.compress.adapters.files import save_adapter
from longshadow.compress.adapters.reading import read_adapter
from longshadow.compress.solver import Factors
from tests.compress.adapters.lora_files import factors_for, with_products, write_lora
from tests.tiny_models import tiny_model, tiny_tokenizer, write_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("base [x]") / "model")


@pytest.fixture(scope="module")
def factors() -> dict[str, Factors]:
    layers = factors_for(tiny_model(), ranks=(4, 8), dtype=torch.bfloat16)
    return {name: Factors(lora_b=f.lora_b / 8, lora_a=f.lora_a / 8) for name, f in layers.items()}


@pytest.fixture
def adapter(tmp_path: Path, base: Path, factors: dict[str, Factors]) -> Path:
    layers = {name: {"rank": f.rank, "before": 0.2, "after": 0.1} for name, f in factors.items()}
    report = {"compensation_report.json": json.dumps({"layers": layers})}
    save_adapter(tmp_path / "adapter [1]", factors, base_model=str(base), others=report)
    return tmp_path / "adapter [1]"


def run(*arguments: Path | str) -> Result:
    return CliRunner().invoke(app, ["adapter", *map(str, arguments)])


def told(*arguments: Path | str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def error_of(result: Result) -> str:
    """The one line on stderr of a mistake."""
    assert result.exit_code == 2 and result.stdout == ""
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    return line


def test_inspect(adapter: Path) -> None:
    found = told("inspect", adapter)
    assert found["total"]["number"] == 14 and found["kinds"]["down_proj"]["error_after"] == pytest.approx(0.1)
    assert found["total"]["ranks"] == [4, 8] and found["unusual"] == []
    table = run("inspect", adapter)
    assert table.exit_code == 0 and "down_proj" in table.stdout and "20.00%" in table.stdout
    assert "adapter [1]" in table.stdout and "base [x]" in table.stdout, "brackets are no markup"


def test_inspect_without_a_report(tmp_path: Path, factors: dict[str, Factors]) -> None:
    folder = write_lora(tmp_path / "lora", factors_for(tiny_model(), ranks=(8,)), lora_alpha=16)
    table = run("inspect", folder)
    assert "relative error" not in table.stdout and "unusual: its scale is 2, not 1" in table.stdout


def test_verify(adapter: Path) -> None:
    found = told("verify", adapter)
    assert found["passed"] and {check["result"] for check in found["checks"]} == {"ok"}
    result = run("verify", adapter)
    assert result.exit_code == 0
    [line] = [line for line in result.stdout.splitlines() if line.startswith("vLLM: yes: ")]
    assert "--max-lora-rank 8 " in line


def test_verify_with_its_base(adapter: Path, base: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra train")
    found = told("verify", adapter, "--base", base, "--device", "cpu")
    assert {check["name"]: check["result"] for check in found["checks"]}["logits"] == "ok"


def test_a_failed_check_is_exit_code_1(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"alpha_pattern": {}}))
    result = run("verify", adapter, "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["passed"] is False
    assert run("verify", adapter).exit_code == 1


def test_verify_needs_peft_for_a_base(adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'longshadow[train]'" in error_of(run("verify", adapter, "--base", base))
    assert run("verify", adapter).exit_code == 0


def test_merge(adapter: Path, tmp_path: Path) -> None:
    own = write_lora(tmp_path / "own", factors_for(tiny_model(), ranks=(8,), seed=3), lora_alpha=4)
    found = told("merge", adapter, own, "--output", tmp_path / "both")
    assert found["shared"] == found["layers"] == 14 and found["rank"] == 16
    assert read_adapter(tmp_path / "both").rank == 16
    result = run("merge", adapter, own, "--output", tmp_path / "again")
    assert result.exit_code == 0 and "note: " in result.stdout and "some/Model" in result.stdout


def test_exports(adapter: Path, base: Path, tmp_path: Path, factors: dict[str, Factors]) -> None:
    assert told("export", adapter, "--to", "padded", "--output", tmp_path / "padded")["detail"].endswith("rank 8")
    assert told("export", adapter, "--to", "gguf", "--output", tmp_path / "a.gguf")["dtype"] == "float16"
    wide = told(
        "export", adapter, "--to", "gguf", "--output", tmp_path / "b.gguf", "--dtype", "float32", "--base", base
    )
    assert wide["dtype"] == "float32" and (tmp_path / "b.gguf").stat().st_size == wide["num_bytes"]
    assert told("export", adapter, "--to", "merged", "--output", tmp_path / "merged")["dtype"] == "float32"
    result = run("export", adapter, "--to", "padded", "--output", tmp_path / "line")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 1


def test_a_base_by_a_relative_path(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is written names it so that it is found from anywhere."""
    factors = factors_for(tiny_model(), ranks=(8,))
    monkeypatch.chdir(base.parent)
    save_adapter(tmp_path / "adapter", factors, base_model=base.name)
    old = write_lora(tmp_path / "old", factors, base_model_name_or_path=f"./{base.name}")  # as PEFT records what it got
    merged = told("merge", old, tmp_path / "adapter", "--output", tmp_path / "merged")
    told("export", old, "--to", "padded", "--output", tmp_path / "padded")
    assert merged["base_model"] == str(base)
    monkeypatch.chdir("/")
    for name in ("adapter", "merged", "padded"):
        assert read_adapter(tmp_path / name).base_model == str(base)
        told("export", tmp_path / name, "--to", "gguf", "--output", tmp_path / f"{name}.gguf")
    assert (
        "vllm serve" in run("verify", tmp_path / "adapter").stdout
        and "'" + str(base) in run("verify", tmp_path / "adapter").stdout
    )
    error = error_of(run("export", old, "--to", "gguf", "--output", tmp_path / "old.gguf"))
    assert f"is for ./{base.name}, which cannot be had here" in error and "give its base with --base" in error


def test_a_base_that_was_moved(tmp_path: Path, base: Path) -> None:
    gone = write_folder(tmp_path / "gone")
    save_adapter(tmp_path / "adapter", factors_for(tiny_model(), ranks=(8,)), base_model=str(gone))
    moved = gone.rename(tmp_path / "moved")
    out = ("--output", tmp_path / "out")
    for form in ("gguf", "merged"):
        error = error_of(run("export", tmp_path / "adapter", "--to", form, *out))
        assert f"is for {gone}, which cannot be had here (there is no folder" in error
    told("export", tmp_path / "adapter", "--to", "gguf", "--base", moved, *out)


def test_mistakes(adapter: Path, tmp_path: Path) -> None:
    nameless = write_lora(tmp_path / "nameless", factors_for(tiny_model(), ranks=(8,)), base_model_name_or_path=None)
    out = ("--output", tmp_path / "out")
    cases = [
        (run("inspect", tmp_path / "none"), "there is no folder"),
        (run("verify", tmp_path), "it has no adapter_config.json"),
        (run("merge", adapter, tmp_path / "none", *out), "there is no folder"),
        (run("merge", adapter, adapter, "--output", adapter), "holds something already"),
        (run("export", nameless, "--to", "gguf", *out), "give it with --base"),
        (run("export", adapter, "--to", "merged", "--base", tmp_path / "none.gguf", *out), "there is no file"),
        (run("verify", adapter, "--base", tmp_path / "none"), "there is no folder"),
        (run("export", adapter, "--to", "gguf", "--dtype", "bfloat16", *out), "not bfloat16"),
    ]
    for result, message in cases:
        assert message in error_of(result)
    assert not (tmp_path / "out").exists()
    assert isinstance(run("inspect", tmp_path / "none", "--debug").exception, ValueError)


def test_options_that_would_change_nothing(adapter: Path, tmp_path: Path) -> None:
    models = ("--original", tmp_path / "none", "--quantized", tmp_path / "none")
    padded = ("export", adapter, "--to", "padded", "--output", tmp_path / "out")
    cases = [
        (run("inspect", adapter, "--device", "cpu"), "--device goes with --original"),
        (run("inspect", adapter, "--max-memory", "8GB"), "--max-memory goes with --original"),
        (run("verify", adapter, "--dtype", "float32"), "--dtype goes with --base"),
        (run("verify", adapter, "--device", "cpu"), "--device goes with --base"),
        (run("evaluate", adapter, *models, "--tasks-limit", "5"), "--tasks-limit goes with --tasks"),
        (run(*padded, "--base", tmp_path / "none"), "--base goes with gguf and merged"),
    ]
    for result, message in cases:
        assert message in error_of(result)
    assert not (tmp_path / "out").exists()


def test_generate_with_an_adapter(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layers = factors_for(tiny_model(), ranks=(8,))
    write_lora(tmp_path / "lora", layers, lora_alpha=12)
    merged = with_products(tiny_model(), (layers, dict.fromkeys(layers, 1.5)))
    merged.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    document = tmp_path / "document.txt"
    document.write_text("0123456789" * 30)

    def generate(model: Path, *options: str) -> Result:
        command = ["generate", "--model", str(model), "--prompt-file", str(document), "--device", "cpu"]
        return CliRunner().invoke(app, [*command, "--max-new-tokens", "12", "--budget", "100%", *options])

    results = [
        generate(base, "--json"),
        generate(base, "--json", "--adapter", str(tmp_path / "lora")),
        generate(tmp_path / "merged", "--json"),
    ]
    plain, adapted, expected = (json.loads(result.stdout) for result in results)
    assert adapted["shadowkv"]["tokens"] == expected["shadowkv"]["tokens"] != plain["shadowkv"]["tokens"]
    assert adapted["adapter"] == str(tmp_path / "lora") and plain["adapter"] is None
    assert "lora: 14 layers, rank 8 at most" in caplog.text
    assert "with" in generate(base, "--adapter", str(tmp_path / "lora")).stdout, "the table says so"
    assert "there is no folder" in error_of(generate(base, "--adapter", str(tmp_path / "none")))


def test_compensate_writes_what_inspect_reads(base: Path, tmp_path: Path) -> None:
    """The name and the form of the report are the same in both."""
    from tests.compress.test_pipeline import round_to_nearest

    round_to_nearest(tiny_model()).save_pretrained(tmp_path / "quantized")
    tiny_tokenizer().save_pretrained(tmp_path / "quantized")
    command = ["compensate", str(base), "--quantized", str(tmp_path / "quantized"), "--output", str(tmp_path / "made")]
    sizes = ["--sequence-length", "64", "--num-samples", "9", "--rank", "8", "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, *sizes])
    assert result.exit_code == 0, result.stderr
    total = told("inspect", tmp_path / "made")["total"]
    assert 0 < total["error_after"] < total["error_before"]
    assert told("verify", tmp_path / "made")["passed"]
