"""`longshadow plan`: what is printed, its settings, one line per mistake, and that torch is never imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from longshadow import ShadowKVConfig
from longshadow.cli import app
from longshadow.engine.planning.implementation import PUBLISHED_HIT_RATE
from tests.engine.planning.test_reading import LLAMA

ROOT = Path(__file__).resolve().parent.parent
LARGE = ("--model", "llama-3.1-8b", "--gpu", "h200", "--context", "122k")


def run(*options: str) -> Result:
    return CliRunner().invoke(app, ["plan", *options])


def told(*options: str) -> Any:
    result = run(*options, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def error_of(result: Result) -> str:
    """The one line on stderr of a mistake."""
    assert result.exit_code == 2 and result.stdout == ""
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    return line


def test_table() -> None:
    result = run(*LARGE, "--host-memory", "128G")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].strip().startswith("predicted: llama-3.1-8b on H200, 124,928 + 512 tokens, largest batch")
    assert all(len(line.rstrip()) <= 80 for line in lines[:7]), lines[:7]
    for name in ("full attention", "ShadowKV, bf16 on the host", "ShadowKV, int8 on the device"):
        assert any(line.startswith(name) for line in lines[1:7])
    assert "Predicted, not measured" in result.stdout and "Predicted to be the fastest: ShadowKV" in result.stdout
    assert "configuration: ShadowKVConfig(" in result.stdout and "in Python: LLM('MODEL', " in result.stdout
    plan = told(*LARGE, "--host-memory", "128G")
    options = f"--max-num-seqs {plan['predictions'][1]['batch']} --max-model-len 125440"
    assert plan["settings"][2] == f"command line, bf16 on the host: longshadow serve MODEL {options}"


def test_json() -> None:
    plan = told(*LARGE, "--batch", "4", "--new-tokens", "64", "--hit-rate", "0.5")
    assert plan["predicted"] is True and plan["num_prompt_tokens"] == 124_928 and plan["hit_rate"] == 0.5
    assert [p["batch"] for p in plan["predictions"]] == [4, 4, 4, 4]
    for prediction in plan["predictions"]:
        seconds = sum(stage["seconds"] for stage in prediction["stages"])
        assert prediction["tokens_per_second"] == pytest.approx(4 / seconds)
    assert told(*LARGE)["hit_rate"] == PUBLISHED_HIT_RATE


def test_settings_are_python() -> None:
    for prediction in told("--model", "yi-9b-200k", "--gpu", "4090", "--context", "100k")["predictions"][1:]:
        config = eval(prediction["settings"], {"ShadowKVConfig": ShadowKVConfig})
        assert config.value_store == ("device" if prediction["name"].endswith("device") else "host")


def test_a_configuration_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    arguments = ("--model", str(tmp_path), "--gpu", "l40s", "--context", "900")
    short = run(*arguments, "--batch", "1").stdout
    assert "fastest: full attention." in short and "no ShadowKVConfig: none is predicted to be faster" in short
    large = dict(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **large, "num_key_value_heads": 8}))
    result = run("--model", str(tmp_path), "--gpu", "l40s", "--context", "122k")
    assert f"longshadow serve {tmp_path} " in result.stdout


def test_nothing_fits() -> None:
    result = run("--model", "llama-3.1-70b", "--gpu", "rtx-4090", "--context", "8k")
    assert result.exit_code == 0 and "Nothing fits" in result.stdout and "in Python" not in result.stdout
    plan = told("--model", "llama-3.1-70b", "--gpu", "rtx-4090", "--context", "8k")
    assert plan["fastest"] is None and plan["settings"] == [] and not any(p["fits"] for p in plan["predictions"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "llama-9"}, "there is no file llama-9, and no shape of that name: known are llama-3.1-8b, "),
        ({"--gpu": "b300"}, "no figures for a GPU 'b300': known are a100"),
        ({"--context": "long"}, "looks like 122k (units of 1,024 tokens) or 124928, got 'long'"),
        ({"--context": "200k"}, "more than the 131,072 positions of llama-3.1-8b"),
        ({"--host-memory": "lots"}, "--host-memory must look like 8GB or 512MiB"),
        ({"--batch": "0"}, "the batch must be at least 1, got 0"),
        ({"--new-tokens": "0"}, "the number of new tokens must be at least 1, got 0"),
        ({"--hit-rate": "1.1"}, "the hit rate must be between 0 and 1, got 1.1"),
    ],
)
def test_mistakes(changes: dict[str, str], message: str) -> None:
    given = {**dict(zip(LARGE[::2], LARGE[1::2], strict=True)), **changes}
    assert message in error_of(run(*(word for pair in given.items() for word in pair)))


def test_debug_shows_the_traceback() -> None:
    assert isinstance(run(*LARGE, "--batch", "0", "--debug").exception, ValueError)


@pytest.mark.parametrize("options", [("--help",), LARGE])
def test_nothing_heavy_is_loaded(options: tuple[str, ...]) -> None:
    code = f"""
import sys
from longshadow.cli import app
sys.argv = ["longshadow", "plan", *{options!r}]
try:
    app()
finally:
    print([name for name in ("torch", "transformers", "numpy", "gguf", "safetensors") if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and ("--host-memory" in done.stdout) == (options == ("--help",))


def test_the_command_line_that_it_advises_is_ours() -> None:
    """Its options exist, with the names and the meaning that the advice takes for granted."""
    import inspect

    from longshadow.engine.runtime import LLM
    from longshadow.serve_cli import serve

    advised = {"max_num_seqs", "max_model_len"}
    assert advised <= inspect.signature(serve).parameters.keys()
    assert advised | {"shadowkv", "max_prefill_tokens"} <= inspect.signature(LLM).parameters.keys()
