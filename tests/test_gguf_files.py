"""GGUF files: reading them, and the converted folder that is either whole or not there."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from longshadow import gguf_files
from longshadow.gguf_files import MANIFEST, WEIGHTS, converted_folder, is_intact, load_gguf, sha256
from tests.tiny_models import write_folder, write_gguf

CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models" / "tiny"


def one_line(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    return message


def leftovers(target: Path) -> list[str]:
    if not target.parent.exists():
        return []
    return sorted(path.name for path in target.parent.iterdir() if path != target and path.suffix != ".lock")


def test_converted_folder_is_the_gguf_model(source: Path, target: Path) -> None:
    folder = converted_folder(source, sha256(source), target)

    expected, expected_tokenizer = load_gguf(source, dtype=torch.float32, device=CPU)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert tokenizer("Grüße\n")["input_ids"] == expected_tokenizer("Grüße\n")["input_ids"]
    assert tokenizer.decode(tokenizer("Grüße\n")["input_ids"]) == "Grüße\n"
    assert leftovers(target) == []


def test_converted_folder_is_what_save_pretrained_writes(source: Path, target: Path, tmp_path: Path) -> None:
    """The tied head is stored once, under the embedding's name: readers that tie by the name find it nowhere else."""
    expected = write_folder(tmp_path / "expected")
    folder = converted_folder(source, sha256(source), target)
    found, wanted = (load_file(place / WEIGHTS) for place in (folder, expected))
    assert found.keys() == wanted.keys() and "model.embed_tokens.weight" in found and "lm_head.weight" not in found
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert {path.name for path in expected.iterdir()} <= {path.name for path in folder.iterdir()}
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    assert "quantization_config" not in config and config["dtype"] == "float32"


def test_a_folder_of_an_older_format_is_converted_again(source: Path, target: Path) -> None:
    manifest = converted_folder(source, sha256(source), target) / MANIFEST
    content = json.loads(manifest.read_text())
    for older in ({key: content[key] for key in content if key != "format"}, content | {"format": 1}):
        manifest.write_text(json.dumps(older))
        assert not is_intact(target, sha256(source))
        converted_folder(source, sha256(source), target)
        assert json.loads(manifest.read_text()) == content


def test_conversion_happens_once(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted_folder(source, sha256(source), target)
    monkeypatch.setattr(gguf_files, "load_gguf", None)
    assert converted_folder(source, sha256(source), target) == target


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (WEIGHTS, "flip"),
        (WEIGHTS, "truncate"),
        (WEIGHTS, "delete"),
        ("config.json", "flip"),
        (MANIFEST, "truncate"),
    ],
)
def test_damaged_folder_is_converted_again(source: Path, target: Path, file: str, damage: str) -> None:
    converted_folder(source, sha256(source), target)
    content = (target / file).read_bytes()
    if damage == "delete":
        (target / file).unlink()
    else:
        changed = content[:-10] if damage == "truncate" else content[:-1] + bytes([content[-1] ^ 1])
        (target / file).write_bytes(changed)

    assert not is_intact(target, sha256(source))
    converted_folder(source, sha256(source), target)
    assert is_intact(target, sha256(source))
    assert leftovers(target) == []


def test_new_source_is_converted_again(source: Path, target: Path) -> None:
    converted_folder(source, sha256(source), target)
    source.write_bytes(source.read_bytes() + b"\0")
    converted_folder(source, sha256(source), target)
    assert json.loads((target / MANIFEST).read_text())["source_sha256"] == sha256(source)


def test_damaged_source_is_refused(source: Path, target: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny\.gguf is damaged") as caught:
        converted_folder(source, "0" * 64, target)
    one_line(caught.value)
    assert not target.exists()


def test_leftover_of_a_killed_conversion_goes(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True)
    (partial / WEIGHTS).write_bytes(b"half")
    converted_folder(source, sha256(source), target)
    assert leftovers(target) == []


def full_disk_in_rust(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_disk_in_python(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "function", "failure"),
    [
        (PreTrainedModel, "save_pretrained", full_disk_in_rust),
        (gguf_files, "_write_manifest", full_disk_in_python),
    ],
)
def test_full_disk(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, owner: object, function: str, failure: object
) -> None:
    monkeypatch.setattr(owner, function, failure)
    with pytest.raises(ValueError, match=r"the disk is full.*LONGSHADOW_CACHE") as caught:
        converted_folder(source, sha256(source), target)
    one_line(caught.value)
    assert not target.exists()
    assert leftovers(target) == []


def test_unwritable_cache_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"cannot write to the cache folder .*LONGSHADOW_CACHE") as caught:
        converted_folder(source, sha256(source), tmp_path / "cache" / "models" / "tiny")
    one_line(caught.value)


def test_interrupted_conversion_leaves_nothing(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_files, "_write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        converted_folder(source, sha256(source), target)
    assert not target.exists()
    assert leftovers(target) == []


def test_unknown_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "strange.gguf", architecture="mystery")
    with pytest.raises(ValueError, match=r"strange\.gguf has an architecture.*mystery.*safetensors") as caught:
        load_gguf(path, dtype=torch.float32, device=CPU)
    one_line(caught.value)


@pytest.mark.parametrize("damage", ["nonsense", "empty", "half a header", "no tensors"])
def test_damaged_gguf(source: Path, damage: str) -> None:
    content = source.read_bytes()
    length = {"empty": 0, "half a header": 300, "no tensors": len(content) - 20_000}
    source.write_bytes(b"nonsense" * 99 if damage == "nonsense" else content[: length[damage]])
    with pytest.raises(ValueError, match=r"tiny\.gguf cannot be read as a GGUF model .* download it again") as caught:
        load_gguf(source, dtype=torch.float32, device=CPU)
    one_line(caught.value)
