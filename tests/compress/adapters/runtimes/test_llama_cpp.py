"""llama.cpp itself, with an exported adapter, beside transformers with B A in its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longshadow.compress.adapters.bases import read_base
from longshadow.compress.adapters.gguf_export import export_gguf
from longshadow.compress.adapters.reading import read_adapter
from tests.compress.adapters.lora_files import factors_for, with_products, write_lora
from tests.tiny_models import tiny_model, write_gguf

FLOAT32 = 0  # ggml's number for it


@torch.no_grad()
def test_logits(tmp_path: Path) -> None:
    llama_cpp: Any = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    base = write_gguf(tmp_path / "tiny.gguf")
    layers = factors_for(tiny_model(), ranks=(3, 8))
    patterns = {name: factors.rank for name, factors in layers.items() if factors.rank == 3}
    folder = write_lora(tmp_path / "lora", layers, lora_alpha=12, rank_pattern=patterns)
    export_gguf(read_adapter(folder), read_base(str(base)), tmp_path / "lora.gguf", torch.float32)

    ids = list(range(7, 47))
    arguments = {"n_ctx": 64, "logits_all": True, "type_k": FLOAT32, "type_v": FLOAT32, "verbose": False}
    model = llama_cpp.Llama(str(base), lora_path=str(tmp_path / "lora.gguf"), **arguments)
    model.eval(ids)
    scales = {name: 12 / factors.rank for name, factors in layers.items()}
    expected: Any = with_products(tiny_model(), (layers, scales))
    found = torch.tensor(model.scores[: len(ids)])
    logits = expected(torch.tensor([ids])).logits[0]
    assert float((found - logits).abs().max() / logits.abs().max()) < 1e-4
    assert float((tiny_model()(torch.tensor([ids])).logits[0] - logits).abs().max() / logits.abs().max()) > 0.5
