"""`longshadow compensate` with models, texts, folders and disks that will not do: one line each, and nothing left."""

import errno
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner, Result

from longshadow.cli import app
from longshadow.compress.command import check_models
from longshadow.compress.estimate import Speed
from longshadow.compress.shards import Shards
from longshadow.models import LoadedModel
from tests.compress.test_pipeline import round_to_nearest
from tests.tiny_models import HIDDEN, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS, TOKENS, tiny_model, tiny_tokenizer

WEIGHTS = "model.safetensors"
SIZES: dict[str, Any] = dict(
    vocab_size=len(TOKENS),
    hidden_size=HIDDEN,
    intermediate_size=2 * HIDDEN,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=NUM_HEADS,
    num_key_value_heads=NUM_KV_HEADS,
    pad_token_id=None,
)


def write(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast this machine is does not matter here."""
    monkeypatch.setattr(Speed, "measured", lambda device: Speed(fp32=1e10, fp64=1e10))


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return write(tiny_model(), tmp_path / "original")


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    return write(round_to_nearest(tiny_model()), tmp_path / "quantized")


def run(original: Path, quantized: Path, *options: str) -> Result:
    output = original.parent / "adapter"
    command = ["compensate", str(original), "--quantized", str(quantized), "--output", str(output), "--device", "cpu"]
    return CliRunner().invoke(app, [*command, "--sequence-length", "32", "--num-samples", "3", "--rank", "4", *options])


def error_of(result: Result) -> str:
    """The one line on stderr of a mistake."""
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def nothing_left(folder: Path) -> bool:
    return not (folder / "adapter").exists() and not list(folder.glob(".adapter*"))


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_shard(folder: Path) -> None:
    model = round_to_nearest(tiny_model())
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="20kB")  # type: ignore[operator]
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()


def lose_a_layer(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({key: it for key, it in weights.items() if ".layers.1." not in key}, folder / WEIGHTS, {"format": "pt"})


def set_weight(name: str, value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        weights[name].view(-1)[5] = value
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return change


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "if its files are damaged or incomplete, get them again"),
    "a shard is missing": (lose_a_shard, "if its files are damaged or incomplete, get them again"),
    "a layer is missing": (lose_a_layer, "parameters are missing, for example model.layers.1."),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "NaN in a layer": (
        set_weight("model.layers.1.mlp.up_proj.weight", float("nan")),
        "weights that are not finite, in model.layers.1.mlp.up_proj.weight: get its files again",
    ),
    "infinite embedding": (set_weight("model.embed_tokens.weight", float("inf")), "not finite, in model.embed_tokens"),
    "NaN in the last norm": (set_weight("model.norm.weight", float("nan")), "not finite, in model.norm.weight"),
    "a LoRA in its folder": (
        lambda folder: (folder / "adapter_config.json").write_text("{}", encoding="utf-8") and None,
        "is a LoRA adapter: give the model without it",
    ),
}


@pytest.mark.parametrize("damaged", ["original", "quantized"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models(original: Path, quantized: Path, damaged: str, damage: str) -> None:
    change, message = DAMAGES[damage]
    folder = original if damaged == "original" else quantized
    change(folder)
    error = error_of(run(original, quantized))
    assert message in error and str(folder) in error
    assert nothing_left(original.parent)


def test_sharded_models_are_read(original: Path, tmp_path: Path) -> None:
    sharded = write(round_to_nearest(tiny_model()), tmp_path / "sharded", max_shard_size="20kB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert run(original, sharded).exit_code == 0


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    # Names and shapes are those of a Llama.
    "Qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), "is no approximation of the original's"),
    "Phi3": (lambda: Phi3ForCausalLM(Phi3Config(**SIZES)), "is in one of them only"),
    "GPT-2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENS), n_embd=HIDDEN, n_layer=2, n_head=NUM_HEADS)),
        "keeps no decoder blocks in model.layers",
    ),
    "fewer layers": (lambda: Qwen2ForCausalLM(Qwen2Config(**(SIZES | {"num_hidden_layers": 1}))), "2 and 1 blocks"),
    "narrower": (
        lambda: Qwen2ForCausalLM(Qwen2Config(**(SIZES | {"intermediate_size": HIDDEN}))),
        f"gate_proj is [{2 * HIDDEN}, {HIDDEN}] in one and [{HIDDEN}, {HIDDEN}] in the other",
    ),
    "more tokens": (
        lambda: Qwen2ForCausalLM(Qwen2Config(**(SIZES | {"vocab_size": 300}))),
        f"has {len(TOKENS)} tokens and",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model(original: Path, tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    make, message = OTHERS[name]
    assert message in error_of(run(original, write(make(), tmp_path / "other")))
    assert nothing_left(tmp_path)


def test_a_model_with_an_adapter_in_it() -> None:
    """As transformers loads a folder or a hub id that has one."""
    peft = pytest.importorskip("peft", reason="needs the extra train")
    models = [
        LoadedModel(name=name, model=tiny_model(), tokenizer=tiny_tokenizer(), max_positions=None) for name in "ab"
    ]
    check_models(*models)
    models[1].model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="b has a LoRA adapter in it"):
        check_models(*models)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "is empty"),
        ("blank.jsonl", "\n \n", "is empty"),
        ("tiny.txt", "A word.\n\n" * 3, "fewer than one sample of 32: give more text, or a smaller --sequence-length"),
        ("one.txt", "A word.", "has 1 document, and needs 3"),
        ("hollow.jsonl", '{"text": " "}\n' * 900, "is empty"),
        ("other.jsonl", '{"text": "a"}\n{"content": "b"}', 'line 2 has no column "text"'),
        ("latin.txt", b"\xe9t\xe9 " * 900, "cannot read the calibration text"),
    ],
)
def test_texts(original: Path, quantized: Path, name: str, content: str | bytes, message: str) -> None:
    path = original.parent / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in error_of(run(original, quantized, "--calibration", str(path)))
    assert nothing_left(original.parent)


@pytest.mark.parametrize("without", ["original", "quantized"])
def test_a_folder_without_a_tokenizer(original: Path, quantized: Path, without: str) -> None:
    """The other model's is taken."""
    for path in (original if without == "original" else quantized).glob("tokenizer*"):
        path.unlink()
    result = run(original, quantized, "--method", "eora", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["calibration"]["add_special_tokens"]


def test_logits_beyond_what_a_perplexity_can_say(original: Path, quantized: Path) -> None:
    for folder in (original, quantized):
        weights = load_file(folder / WEIGHTS)
        weights["model.norm.weight"] *= 1e4
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    result = run(original, quantized, "--method", "eora", "--json")
    assert result.exit_code == 0, result.stderr
    row = json.loads(result.stdout, parse_constant=pytest.fail)["report"]["original"]
    assert row["perplexity"] is None and row["loss"] > 710
    shutil.rmtree(original.parent / "adapter")
    assert "above 1e308" in run(original, quantized, "--method", "eora").stdout


def test_another_revision_is_told(original: Path, quantized: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(quantized / WEIGHTS)
    weights["model.embed_tokens.weight"] += 0.01 * torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights, quantized / WEIGHTS, metadata={"format": "pt"})
    result = run(original, quantized, "--method", "eora")
    assert result.exit_code == 0
    [message] = [it.getMessage() for it in caplog.records if "was hardly made of" in it.getMessage()]
    assert "model.embed_tokens.weight is" in message and "apart, which quantisation leaves alone" in message


def test_an_output_of_another_run(original: Path, quantized: Path) -> None:
    assert run(original, quantized).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in (original.parent / "adapter").iterdir()}
    assert "holds something already: choose another --output" in error_of(run(original, quantized))
    assert before == {path: path.stat().st_mtime_ns for path in (original.parent / "adapter").iterdir()}


def test_a_full_disk_is_seen_before_work_starts(
    original: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr("longshadow.compress.command.load_model", None)
    error = error_of(run(original, quantized))
    assert "0.0 GB left on its disk" in error and "free some space" in error
    made = original.parent / "made"
    assert "are needed" in error_of(run(original, made, "--quantize", "2:4"))
    assert not made.exists() and nothing_left(original.parent)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up(
    original: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """The same command goes on once there is room."""
    save = Shards.save

    def fail(self: Shards, name: str, *given: Any) -> None:
        if name == "block_00001":
            raise failure
        save(self, name, *given)

    monkeypatch.setattr(Shards, "save", fail)
    assert "No space left on device" in (error := error_of(run(original, quantized))) and "free some space" in error
    monkeypatch.setattr(Shards, "save", save)
    monkeypatch.setattr("longshadow.compress.pipeline.Calibrator.measure", counted := Counted())
    assert run(original, quantized).exit_code == 0
    assert counted.names == ["model.layers.1"]


class Counted:
    """The blocks that are measured, not those that lay on the disk."""

    def __init__(self) -> None:
        from longshadow.compress.measure import Calibrator

        self.names: list[str] = []
        self._measure = Calibrator.measure

    def __call__(self, original: Any, quantized: Any, hidden: Any, name: str) -> Any:
        from longshadow.compress.measure import Calibrator

        self.names.append(name)
        return self._measure(Calibrator(), original, quantized, hidden, name)


def test_a_damaged_piece_is_made_anew(original: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that a machine lost power over."""
    save = Shards.save

    def stop(self: Shards, name: str, *given: Any) -> None:
        save(self, name, *given)
        if name == "block_00001":
            raise KeyboardInterrupt

    monkeypatch.setattr(Shards, "save", stop)
    assert run(original, quantized).exit_code == 130
    monkeypatch.setattr(Shards, "save", save)
    path = original.parent / ".adapter.fisher.unfinished" / "block_00000.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    again = run(original, quantized, "--json")
    assert again.exit_code == 0, again.stderr
    shutil.rmtree(original.parent / "adapter")
    assert json.loads(run(original, quantized, "--json").stdout) == json.loads(again.stdout)


def test_not_enough_memory(original: Path, quantized: Path) -> None:
    error = error_of(run(original, quantized, "--max-memory", "20kB"))
    assert "are allowed: take a smaller --num-samples or --sequence-length" in error and nothing_left(original.parent)
