"""Quantised models made on the way, each by its library."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from longshadow.compress.blocks import decoder_blocks, linear_layers
from longshadow.compress.formats import weight_of
from longshadow.compress.quantize import quantize_model
from longshadow.models import load_model
from tests.tiny_models import tiny_model, tiny_tokenizer, write_folder

# Rows of at least a block of bitsandbytes, which a CPU cannot do without.
SIZES: dict[str, Any] = dict(
    vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, pad_token_id=None
)


def test_two_of_four(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "original")
    quantize_model(str(source), "2:4", tmp_path / "quantized", dtype=torch.float32)
    weights = tmp_path / "quantized" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    quantize_model(str(source), "2:4", tmp_path / "quantized", dtype=torch.float32)  # nothing is left to do
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds something already"):
        quantize_model(str(source), "2:4", tmp_path / "quantized")
    pruned = load_model(str(tmp_path / "quantized"), device="cpu").model
    for block, original in zip(decoder_blocks(pruned), decoder_blocks(tiny_model()), strict=True):
        for name, layer in linear_layers(block).items():
            weight, given = weight_of(layer).view(-1, 4), weight_of(original.get_submodule(name)).view(-1, 4)
            kept = weight != 0
            assert (kept.sum(1) == 2).all() and torch.equal(weight[kept], given[kept])
            assert (given.abs().masked_fill(kept, 0).amax(1) <= given.abs().masked_fill(~kept, 9).amin(1)).all()
    assert torch.equal(pruned.get_input_embeddings().weight, tiny_model().get_input_embeddings().weight)
    assert load_file(weights).keys() == load_file(source / "model.safetensors").keys()


def test_the_same_original_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a relative path from its parent's folder, and by its whole path."""
    write_folder(tmp_path / "original")
    monkeypatch.chdir(tmp_path)
    quantize_model("original", "2:4", tmp_path / "quantized")
    before = (tmp_path / "quantized" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.chdir("/")
    quantize_model(str(tmp_path / "original"), "2:4", tmp_path / "quantized")
    assert (tmp_path / "quantized" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("library", "scheme", "apart"),
    [
        ("bitsandbytes", "nf4", 0.12),
        ("torchao", "int8:g32", 0.01),
        ("torchao", "int4:g32", 0.12),
        ("torchao", "int3:g32", 0.25),
    ],
)
def test_by_a_library(tmp_path: Path, library: str, scheme: str, apart: float) -> None:
    pytest.importorskip(library, reason="needs the extra quant")
    torch.manual_seed(0)
    original = LlamaForCausalLM(LlamaConfig(**SIZES))
    original.save_pretrained(tmp_path / "original")
    tiny_tokenizer().save_pretrained(tmp_path / "original")
    quantize_model(str(tmp_path / "original"), scheme, tmp_path / "quantized")
    quantized = load_model(str(tmp_path / "quantized"), device="cpu").model
    for block, other in zip(decoder_blocks(quantized), decoder_blocks(original), strict=True):
        for name, layer in linear_layers(block).items():
            given = weight_of(other.get_submodule(name))
            distance = (weight_of(layer) - given).norm() / given.norm()
            assert 0 < distance < apart


def test_an_original_that_has_changed_since(tmp_path: Path) -> None:
    source, folder = write_folder(tmp_path / "original"), tmp_path / "quantized"
    quantize_model(str(source), "2:4", folder)
    changed = tiny_model()
    changed.get_input_embeddings().weight.data += 1
    changed.save_pretrained(source)
    with pytest.raises(ValueError, match="before the original changed: remove it, or choose another folder"):
        quantize_model(str(source), "2:4", folder)


def test_mistakes(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "original")
    with pytest.raises(ValueError, match=r"--quantize takes nf4"):
        quantize_model(str(source), "int5:g32", tmp_path / "quantized")
    with pytest.raises(ValueError, match="holds something already"):
        quantize_model(str(source), "2:4", source)
    assert not (tmp_path / "quantized").exists()
