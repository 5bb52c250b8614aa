"""The example trains an adapter and nothing else, goes on where it was stopped, and says in one line what is wrong."""

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from longshadow.models import load_model
from tests.tiny_models import END, write_folder

trl = pytest.importorskip("trl", reason="needs the extra train")

from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "examples" / "dpo_prefix_sharing.py"
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}" + END + "{% endif %}{% endfor %}"
)
TRAINING = ["--batch-size", "2", "--learning-rate", "1e-2", "--max-length", "256", "--lora-rank", "4"]
COLOURS = ("red", "green", "blue", "white", "black", "yellow")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small only waits for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def example() -> Any:
    specification = importlib.util.spec_from_file_location("dpo_prefix_sharing", PATH)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("tiny"), chat_template=TEMPLATE)


def pairs(*, messages: bool = False) -> list[dict[str, Any]]:
    """Six; the last has a longer prompt than the others."""
    texts = [
        (f"Name a thing that is {colour} and tell why it is.\n", f"A {colour} ball, by its paint.", "No.")
        for colour in COLOURS
    ]
    texts[-1] = (texts[-1][0] * 3, *texts[-1][1:])
    roles = ("user", "assistant", "assistant")
    return [
        {
            name: [{"role": role, "content": text}] if messages else text
            for name, role, text in zip(("prompt", "chosen", "rejected"), roles, row, strict=True)
        }
        for row in texts
    ]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs())


def run(example: Any, data: Path, model: Path | str, folder: Path, *options: str) -> Result:
    command = ["--data", str(data), "--model", str(model), "--output-dir", str(folder), *TRAINING, *options]
    return CliRunner().invoke(example.app, command)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def interrupt(example: Any, monkeypatch: pytest.MonkeyPatch, *, in_step: int, times: int = 1) -> None:
    """Ctrl-C when a step has begun."""

    def on_step_begin(callback: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == in_step - 1:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(example.LossInBar, "on_step_begin", on_step_begin)


def test_only_the_adapter_learns(
    example: Any, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = []
    make = example.make_trainer

    def kept(*arguments: Any, **lora: Any) -> Any:
        trainers.append(make(*arguments, **lora))
        return trainers[-1]

    monkeypatch.setattr(example, "make_trainer", kept)
    result = run(example, data, model, tmp_path, "--epochs", "2", "--gradient-accumulation", "2")
    assert result.exit_code == 0, result.output
    (trainer,) = trainers
    report = trainer.policy_sharing
    assert report.verified and report.shared_batches == 12 and report.ordinary_batches == 0  # policy and reference
    line = r"4 steps, final loss (0\.\d{4}), token ratio (\d\.\d\d) \(padded / computed\), adapter in (.+)\n"
    match = re.fullmatch(line, result.stdout)
    assert match is not None, result.stdout
    assert float(match[1]) < 0.69 and match[3] == str(tmp_path)
    assert float(match[2]) == round(report.padded_tokens / report.unique_tokens, 2) > 1.2
    assert "4/4" in result.stderr and "loss=" in result.stderr

    base = load_model(str(model), device="cpu").model
    stored = dict(base.named_parameters())
    trained = {name.replace(".base_layer", ""): p for name, p in trainer.model.get_base_model().named_parameters()}
    for name, parameter in stored.items():
        assert torch.equal(trained[name], parameter), name
    assert all("lora_" in name for name in trained.keys() - stored.keys())
    assert all(weight.any() for weight in adapter_of(tmp_path).values())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = base(ids).logits
        loaded = PeftModel.from_pretrained(base, tmp_path)(ids).logits
        torch.testing.assert_close(loaded, trainer.model.eval()(ids).logits)
    assert (loaded - before).abs().max() > 1e-3


@pytest.mark.parametrize("options", [(), ("--lora-dropout", "0.2", "--gradient-accumulation", "2")])
def test_resumed_weights_are_those_of_one_run(
    example: Any, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    options = ("--steps", "5", *options)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(example, data, model, whole, *options).exit_code == 0
    with monkeypatch.context() as patch:
        interrupt(example, patch, in_step=3)
        stopped = run(example, data, model, parts, *options)
    assert stopped.exit_code == 130 and stopped.stdout == ""
    message = f"interrupted after step 3 of 5; add --resume to continue from {parts}/checkpoint-3\n"
    assert stopped.stderr.endswith(message)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    (parts / "checkpoint-4").mkdir()  # one that was cut short
    resumed = run(example, data, model, parts, *options, "--resume")
    assert resumed.exit_code == 0 and resumed.stdout.startswith("5 steps, "), resumed.output
    expected = adapter_of(whole)
    for name, weight in adapter_of(parts).items():
        assert torch.equal(weight, expected[name]), name

    again = run(example, data, model, parts, *options, "--resume")
    assert again.exit_code == 0
    assert again.stdout == f"nothing to do: 5 of 5 steps are done, adapter in {parts}/checkpoint-5\n"
    other = run(example, data, model, parts, *options, "--resume", "--lora-rank", "8")
    assert_error(other, f"checkpoint-5 adapts {model} with rank 4; resume with the same --model and --lora-rank")
    assert_error(run(example, data, model, parts, *options), f"{parts} holds checkpoints; --resume continues them")


def test_a_second_interrupt_stops_at_once(
    example: Any, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(example, monkeypatch, in_step=2, times=2)
    result = run(example, data, model, tmp_path, "--steps", "3", "--save-steps", "1")
    assert result.exit_code == 130
    assert result.stderr.endswith("stopped at once; add --resume to continue from the newest checkpoint\n")
    assert example.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_interrupt_of_a_process(data: Path, model: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(PATH), "--data", str(data), "--model", str(model), "--output-dir", str(tmp_path)]
    process = subprocess.Popen([*command, *TRAINING, "--steps", "1000000"], stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stderr is not None
    seen = b""
    while b"loss=" not in seen:  # shown after the first step
        read = process.stderr.read1()
        assert read, seen
        seen += read
    process.send_signal(signal.SIGINT)
    seen += process.stderr.read()
    assert process.wait() == 130
    found = re.search(r"interrupted after step (\d+) of 1000000; add --resume to continue from (.+)\n", seen.decode())
    assert found is not None, seen
    assert found[2] == f"{tmp_path}/checkpoint-{found[1]}" and b"Traceback" not in seen
    assert json.loads((Path(found[2]) / "trainer_state.json").read_text())["global_step"] == int(found[1])
    assert {"optimizer.pt", "adapter_model.safetensors"} <= {path.name for path in Path(found[2]).iterdir()}


def test_messages_train_as_the_text_they_render_to(example: Any, data: Path, model: Path, tmp_path: Path) -> None:
    messages = write(tmp_path / "messages.jsonl", pairs(messages=True))
    for name, path in (("texts", data), ("messages", messages)):
        result = run(example, path, model, tmp_path / name, "--steps", "2")
        assert result.exit_code == 0, result.output
    expected = adapter_of(tmp_path / "texts")
    for name, weight in adapter_of(tmp_path / "messages").items():
        assert torch.equal(weight, expected[name]), name


def test_dropout_is_applied(example: Any, data: Path, model: Path, tmp_path: Path) -> None:
    for dropout in ("0", "0.5"):
        result = run(example, data, model, tmp_path / dropout, "--steps", "1", "--lora-dropout", dropout)
        assert result.exit_code == 0, result.output
    exact, dropped = (adapter_of(tmp_path / dropout) for dropout in ("0", "0.5"))
    assert any(not torch.equal(weight, dropped[name]) for name, weight in exact.items())


def test_prompts_that_leave_no_room_are_left_out(example: Any, data: Path, model: Path, tmp_path: Path) -> None:
    result = run(example, data, model, tmp_path / "some", "--max-length", "80")
    assert "1 of 6 pairs are left out: their prompts fill --max-length\n" in result.stderr
    assert result.stdout.startswith("3 steps, ")  # an epoch of five pairs
    nothing = run(example, data, model, tmp_path / "none", "--max-length", "8")
    assert_error(nothing, "no pair is left; raise --max-length")


def test_the_data_of_the_readme_can_be_read(example: Any) -> None:
    read = example.read_pairs(ROOT / "examples" / "preferences.jsonl")
    assert len(read) == 24 and all(pair["chosen"] != pair["rejected"] for pair in read)


GOOD = json.dumps(pairs()[0])
MESSAGES = json.dumps(pairs(messages=True)[0])
BAD_FILES = {
    "no JSON": (f"{GOOD}\n\n{{'prompt': 1}}\n", "line 3 is not JSON (Expecting property name"),
    "missing columns": (f'{GOOD}\n{{"prompt": "a"}}\n', "line 2 has no chosen, rejected; each line needs prompt"),
    "no object": ('["prompt", "chosen"]\n', "line 1 has no prompt, chosen, rejected"),
    "an empty answer": (GOOD.replace('"No."', '""'), "line 1: rejected must be a text or a list of"),
    "a number": (GOOD.replace('"No."', "3"), "line 1: rejected must be a text or a list of"),
    "messages without roles": (GOOD.replace('"No."', '[{"content": "No."}]'), "line 1: rejected must be a text or"),
    "both forms in a line": (
        GOOD.replace('"No."', '[{"role": "assistant", "content": "No."}]'),
        "line 1 mixes texts and messages; use one form in all lines",
    ),
    "both forms in a file": (f"{GOOD}\n{MESSAGES}\n", "line 2 mixes texts and messages; use one form in all lines"),
    "empty": ("\n", "bad.jsonl is empty; write one JSON object with prompt, chosen, rejected per line"),
    "not UTF-8": (b'{"prompt": "\xff"}', "bad.jsonl is not UTF-8 text; save it as UTF-8"),
}


def assert_error(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(example: Any, tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_error(run(example, path, "demo", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def test_bad_options(example: Any, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = tmp_path / "absent.jsonl"
    assert_error(run(example, absent, model, tmp_path), f"there is no file {absent}; --data takes a JSONL file")
    assert_error(run(example, data, model, data), f"cannot write to {data} (File exists); choose another --output-dir")
    both = run(example, data, model, tmp_path, "--steps", "1", "--epochs", "1")
    assert_error(both, "give --steps or --epochs, not both")
    none = run(example, data, model, tmp_path, "--resume")
    assert_error(none, f"{tmp_path} holds no checkpoint; leave --resume out to start from the beginning")
    assert_error(run(example, data, tmp_path, tmp_path), f"{tmp_path} is no model folder: it has no config.json")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert_error(run(example, data, model, tmp_path), "this needs TRL and PEFT: pip install 'longshadow[train]' (")


def test_messages_need_a_chat_template(example: Any, model: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(model, plain)
    (plain / "chat_template.jinja").unlink()
    messages = write(tmp_path / "messages.jsonl", pairs(messages=True))
    assert_error(run(example, messages, plain, tmp_path / "out"), "chat template")
