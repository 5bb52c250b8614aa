"""The command line: what goes to which stream, exit codes, one line per mistake."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from longshadow import models, streaming
from longshadow.cli import app
from tests.tiny_models import KEY_WIDTH, MAX_POSITIONS, write_folder

ROOT = Path(__file__).resolve().parent.parent
NUM_DOCUMENT_TOKENS = 1500


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text("0123456789" * (NUM_DOCUMENT_TOKENS // 10))
    return path


def run(model: Path | str, document: Path | str, *options: str) -> Result:
    command = ["generate", "--model", str(model), "--prompt-file", str(document), "--device", "cpu"]
    if "--max-new-tokens" not in options:
        command += ["--max-new-tokens", "12"]
    return CliRunner().invoke(app, [*command, *options])


def error_of(result: Result) -> str:
    """The one line on stderr of a mistake."""
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0]


def test_answer_and_table(model: Path, document: Path) -> None:
    result = run(model, document, "--question", "Why?")
    assert result.exit_code == 0, result.stderr
    assert "ShadowKV" in result.stdout
    assert "1,506" in result.stdout, "document, empty line and question"
    assert "full attention" not in result.stdout
    assert "Traceback" not in result.stderr


def test_comparison(model: Path, document: Path) -> None:
    result = run(model, document, "--compare")
    assert result.exit_code == 0, result.stderr
    assert "full attention" in result.stdout
    assert "equal tokens" in result.stdout


def test_json(model: Path, document: Path) -> None:
    result = run(model, document, "--json", "--compare", "--budget", "128", "--rank", "8")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["prompt_tokens"] == NUM_DOCUMENT_TOKENS
    assert 0 <= told["equal_tokens"] <= 1
    assert len(told["shadowkv"]["tokens"]) == len(told["full_attention"]["tokens"]) == 12
    assert told["shadowkv"]["attended_fraction"] < 0.5


def test_budget_and_rank_that_keep_everything_give_the_same_answer(model: Path, document: Path) -> None:
    everything = ("--budget", "100%", "--rank", str(KEY_WIDTH))
    told = json.loads(run(model, document, "--json", "--compare", *everything).stdout)
    assert told["equal_tokens"] == 1


def test_rank_by_energy(model: Path, document: Path) -> None:
    assert run(model, document, "--rank", "auto", "--budget", "64").exit_code == 0


def test_document_from_standard_input(model: Path) -> None:
    command = ["generate", "--model", str(model), "--prompt-file", "-", "--max-new-tokens", "2", "--json"]
    result = CliRunner().invoke(app, command, input="Some text.")
    assert json.loads(result.stdout)["prompt_tokens"] == 10


def test_new_tokens_are_cut_to_the_positions(model: Path, tmp_path: Path) -> None:
    document = tmp_path / "long.txt"
    document.write_text("x" * (MAX_POSITIONS - 3))
    result = run(model, document, "--json")
    assert len(json.loads(result.stdout)["shadowkv"]["tokens"]) == 3
    assert "leave room for 3 new tokens" in result.stderr


def test_prompt_too_long(model: Path, tmp_path: Path) -> None:
    document = tmp_path / "long.txt"
    document.write_text("x" * 5000)
    error = error_of(run(model, document))
    assert "5,000 tokens" in error
    assert f"{MAX_POSITIONS:,} positions" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "above 0%, at most 100%) or a number of tokens (1 or more), got '0'"),
        (["--budget", "-5"], "got '-5'"),
        (["--budget", "0%"], "got '0%'"),
        (["--budget", "101%"], "got '101%'"),
        (["--budget", "nan%"], "got 'nan%'"),
        (["--budget", "1.5"], "got '1.5'"),
        (["--budget", "much"], "got 'much'"),
        (["--rank", "0"], "--rank takes a number (1 or more) or auto, got '0'"),
        (["--rank", "high"], "got 'high'"),
        (["--max-new-tokens", "0"], "at least 1, got 0"),
        (["--temperature", "-1"], "got -1.0"),
        (["--top-p", "2"], "at most 1, got 2.0"),
    ],
)
def test_options_out_of_range(model: Path, document: Path, options: list[str], message: str) -> None:
    assert message in error_of(run(model, document, *options))


def test_rank_above_the_keys_width(model: Path, document: Path) -> None:
    error = error_of(run(model, document, "--rank", str(KEY_WIDTH + 1)))
    assert f"between 1 and {KEY_WIDTH}" in error


def test_missing_files(model: Path, document: Path, tmp_path: Path) -> None:
    assert "cannot read the prompt file" in error_of(run(model, tmp_path / "none.txt"))
    assert "there is no folder" in error_of(run(tmp_path / "none", document))


def test_debug_shows_the_traceback(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "none.txt", "--debug")
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)


def test_faults_of_our_own_are_not_dressed_up(model: Path, document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object, **__: object) -> None:
        raise RuntimeError("lost")

    monkeypatch.setattr(models, "load_model", fault)
    assert isinstance(run(model, document).exception, RuntimeError)


def test_out_of_memory(model: Path, document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object, **__: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(models, "load_model", fault)
    assert "out of memory (no more); try" in error_of(run(model, document))


def test_interrupted_generation(model: Path, document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = streaming.MeasuringStreamer.put

    def interrupted_put(self: streaming.MeasuringStreamer, value: object) -> None:
        put(self, value)  # type: ignore[arg-type]
        if len(self.tokens) == 5:
            raise KeyboardInterrupt

    whole = json.loads(run(model, document, "--json").stdout)
    monkeypatch.setattr(streaming.MeasuringStreamer, "put", interrupted_put)
    result = run(model, document, "--json", "--compare")
    assert result.exit_code == 130
    told = json.loads(result.stdout)
    assert told["interrupted"]
    assert told["shadowkv"]["tokens"] == whole["shadowkv"]["tokens"][:5]
    assert told["full_attention"] is None, "Ctrl-C means stop"

    result = run(model, document)
    assert result.exit_code == 130
    assert "5 (interrupted)" in result.stdout


def test_interrupted_loading(model: Path, document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load_model", interrupt)
    result = run(model, document)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


WAIT_AT_THE_FIFTH_TOKEN = """
import sys, time
from longshadow import streaming
from longshadow.cli import app
put = streaming.MeasuringStreamer.put

def waiting_put(self, value):
    put(self, value)
    if len(self.tokens) == 5:
        print("waiting", file=sys.stderr, flush=True)
        time.sleep(60)

streaming.MeasuringStreamer.put = waiting_put
app()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_in_a_terminal(model: Path, document: Path) -> None:
    command = [sys.executable, "-c", WAIT_AT_THE_FIFTH_TOKEN, "generate", "--model", str(model)]
    command += ["--prompt-file", str(document), "--max-new-tokens", "12", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    assert process.stderr is not None
    assert any("waiting" in line for line in iter(process.stderr.readline, ""))
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "5 (interrupted)" in output
    assert "Traceback" not in errors


@pytest.mark.parametrize("command", [["generate"], ["compensate"], ["adapter", "export"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = f"""
import sys
from longshadow.cli import app
sys.argv = ["longshadow", *{command!r}, "--help"]
try:
    app()
except SystemExit:
    print([name for name in ("torch", "transformers", "numpy", "gguf", "safetensors") if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "--json" in done.stdout


def test_env() -> None:
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    assert "torch: " in result.stdout
    assert "torch" in json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
