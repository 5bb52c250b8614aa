"""Each runtime's rules, on adapters and bases that keep and break them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from longshadow.compress.adapters.bases import Base, read_base
from longshadow.compress.adapters.reading import Adapter, read_adapter
from longshadow.compress.adapters.runtimes import VLLM_RANKS, Verdict, verdicts, vllm_rank
from longshadow.compress.solver import Factors
from longshadow.model_sources import quantization_method
from tests.compress.adapters.lora_files import write_lora
from tests.tiny_models import tiny_model, write_gguf


def adapter_of(folder: Path, ranks: tuple[int, ...] = (8,), **config: Any) -> Adapter:
    layers = {
        f"layers.{number}.q_proj": Factors(lora_b=torch.ones(4, rank), lora_a=torch.ones(rank, 4))
        for number, rank in enumerate(ranks)
    }
    patterns = {name: layer.rank for name, layer in layers.items()} if len(set(ranks)) > 1 else {}
    stated = {"r": max(ranks), "lora_alpha": max(ranks), "rank_pattern": patterns, "alpha_pattern": patterns}
    return read_adapter(write_lora(folder, layers, **{**stated, **config}))


def verdict(adapter: Adapter, runtime: str, method: str) -> Verdict:
    base = Base(name="the/base", method=method, config=LlamaConfig())
    [found] = [verdict for verdict in verdicts(adapter, base) if verdict.runtime == runtime]
    return found


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (2, 8), (8, 8), (33, 64), (257, 320), (321, 512), (513, None)])
def test_sizes_of_vllm(rank: int, size: int | None) -> None:
    assert vllm_rank(rank) == size
    assert size is None or size in VLLM_RANKS


def test_vllm(tmp_path: Path) -> None:
    plain, mixed = adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "mixed", (8, 20))
    found = verdict(plain, "vLLM", "gptq")
    assert found.serves and "vllm serve the/base --enable-lora --max-lora-rank 8 " in found.line
    assert "memory of rank" not in found.line
    assert "--max-lora-rank 32 " in verdict(mixed, "vLLM", "dense").line
    assert "every layer takes the memory of rank 32" in verdict(mixed, "vLLM", "dense").line
    for method in ("awq", "fp8", "compressed-tensors", "torchao", "modelopt_fp4"):
        assert verdict(plain, "vLLM", method).serves
    for method in ("bitsandbytes", "gguf", "hqq", "quanto"):
        refused = verdict(plain, "vLLM", method)
        assert refused.serves is False and method in refused.line


@pytest.mark.parametrize(
    ("config", "serves"),
    [
        ({"use_dora": True}, False),
        ({"bias": "all"}, False),
        ({"init_lora_weights": "pissa"}, False),
        ({"init_lora_weights": "gaussian"}, True),
        ({"modules_to_save": ["classifier"]}, True),
        ({"modules_to_save": ["classifier", "lm_head"]}, False),
        ({"use_rslora": True}, True),
    ],
)
def test_what_vllm_takes(tmp_path: Path, config: dict[str, Any], serves: bool) -> None:
    assert verdict(adapter_of(tmp_path / "lora", **config), "vLLM", "dense").serves is serves


def test_a_rank_beyond_vllm(tmp_path: Path) -> None:
    found = verdict(adapter_of(tmp_path / "lora", (600,)), "vLLM", "dense")
    assert found.serves is False and "rank 600" in found.line


def test_the_others(tmp_path: Path) -> None:
    plain, dora = adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "dora", use_dora=True)
    mixed = adapter_of(tmp_path / "mixed", (8, 16))
    assert verdict(dora, "PEFT", "bitsandbytes").serves and verdict(plain, "PEFT", "quanto").serves is None
    assert verdict(plain, "SGLang", "dense").serves and verdict(plain, "SGLang", "bitsandbytes").serves is None
    overruled = adapter_of(tmp_path / "overruled", rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 16})
    same = adapter_of(tmp_path / "same", rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 8})
    for adapter, hint in ((mixed, True), (overruled, True), (same, False), (plain, False)):
        assert ("padded" in verdict(adapter, "SGLang", "dense").line) is hint
    assert verdict(dora, "SGLang", "dense").serves is verdict(dora, "llama.cpp", "gguf").serves is False
    assert "-m the/base --lora" in verdict(plain, "llama.cpp", "gguf").line
    assert "convert the base" in verdict(plain, "llama.cpp", "dense").line
    assert verdict(plain, "llama.cpp", "gptq").serves is False


def test_without_a_base(tmp_path: Path) -> None:
    found = verdicts(adapter_of(tmp_path / "lora"), None)
    assert [verdict.runtime for verdict in found] == ["PEFT", "vLLM", "SGLang", "llama.cpp"]
    assert all("\n" not in verdict.line and verdict.serves is None for verdict in found)
    assert found[1].line.startswith("if it loads the base: vllm serve some/Model ")
    assert [v.serves for v in verdicts(adapter_of(tmp_path / "dora", use_dora=True), None)] == [
        None,
        False,
        False,
        False,
    ]


def test_how_bases_are_stored(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "dense")
    assert read_base(str(tmp_path / "dense")).method == "dense"
    found = read_base(str(write_gguf(tmp_path / "tiny.gguf")))
    assert found.method == "gguf" and found.config.num_attention_heads == 4
    for stored, method in [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"load_in_4bit": True}, "bitsandbytes")]:
        assert quantization_method(LlamaConfig(quantization_config=stored)) == method
    for name in ("nowhere/at-all", str(tmp_path / "none.gguf"), str(tmp_path)):
        with pytest.raises(ValueError, match=r"cannot load nowhere/at-all|no file|no config.json"):
            read_base(name, only_here=True)
