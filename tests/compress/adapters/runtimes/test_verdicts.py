"""Each runtime's rules, on adapters and bases that keep and break them."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3VLConfig

from longshadow.compress.adapters.bases import Base, read_base
from longshadow.compress.adapters.gguf_export import export_gguf
from longshadow.compress.adapters.padding import export_padded
from longshadow.compress.adapters.reading import Adapter, read_adapter
from longshadow.compress.adapters.runtimes import VLLM_RANKS, Verdict, verdicts, vllm_rank
from longshadow.compress.solver import Factors
from longshadow.model_sources import has_4_bit_weights, quantization_method
from tests.compress.adapters.lora_files import write_lora
from tests.tiny_models import tiny_model, write_gguf

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUALIFIED = {name: f"self_attn.{name}" for name in LLAMA[:4]} | {name: f"mlp.{name}" for name in LLAMA[4:]}


def adapter_of(
    folder: Path,
    ranks: tuple[int, ...] = (8,),
    *,
    kinds: tuple[str, ...] = LLAMA,
    prefix: str = "model.layers",
    others: dict[str, torch.Tensor] | None = None,
    **config: Any,
) -> Adapter:
    """As many blocks as ranks, or one for each of the two of the base, and in each all kinds of layers."""
    names = [(f"{prefix}.{block}.{QUALIFIED.get(kind, kind)}", block) for block in range(2) for kind in kinds]
    layers = {
        name: Factors(lora_b=torch.ones(8, rank), lora_a=torch.ones(rank, 4))
        for name, block in names
        for rank in [ranks[block % len(ranks)]]
    }
    patterns = {name: layer.rank for name, layer in layers.items()} if len(set(ranks)) > 1 else {}
    stated = {"r": max(ranks), "lora_alpha": max(ranks), "rank_pattern": patterns, "alpha_pattern": patterns}
    return read_adapter(write_lora(folder, layers, others, **{**stated, **config}))


def base_for(architecture: str = "LlamaForCausalLM", method: str = "dense", **known: Any) -> Base:
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, **known.pop("config", {}))
    return Base(name="the/base", method=method, config=config, architecture=architecture, **known)


def verdict(adapter: Adapter, runtime: str, base: Base, fault: str | None = None) -> Verdict:
    [found] = [verdict for verdict in verdicts(adapter, base, fault) if verdict.runtime == runtime]
    return found


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (2, 8), (8, 8), (33, 64), (257, 320), (321, 512), (513, None)])
def test_sizes_of_vllm(rank: int, size: int | None) -> None:
    assert vllm_rank(rank) == size
    assert size is None or size in VLLM_RANKS


def test_vllm(tmp_path: Path) -> None:
    plain, mixed = adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "mixed", (8, 20))
    found = verdict(plain, "vLLM", base_for(method="gptq"))
    assert found.serves and "vllm serve the/base --enable-lora --max-lora-rank 8 " in found.line
    assert "memory of rank" not in found.line
    uneven = verdict(mixed, "vLLM", base_for())
    assert uneven.serves and "--max-lora-rank 32 " in uneven.line
    assert "every layer takes the memory of rank 32" in uneven.line
    for method in ("awq", "fp8", "compressed-tensors", "torchao", "modelopt_fp4"):
        assert verdict(plain, "vLLM", base_for(method=method)).serves
    for method in ("bitsandbytes", "gguf", "hqq", "quanto"):
        refused = verdict(plain, "vLLM", base_for(method=method))
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
        ({"r": 600, "rank_pattern": {".*": 8}}, False),
    ],
)
def test_what_vllm_takes(tmp_path: Path, config: dict[str, Any], serves: bool) -> None:
    assert verdict(adapter_of(tmp_path / "lora", **config), "vLLM", base_for()).serves is serves


@pytest.mark.parametrize(
    ("architecture", "adapter", "serves"),
    [
        ("LlamaForCausalLM", {"kinds": ("c_attn",)}, False),
        ("LlamaForCausalLM", {"prefix": "layers"}, False),
        ("MistralForCausalLM", {}, True),
        ("Qwen3ForCausalLM", {}, True),
        ("Phi3ForCausalLM", {}, False),
        ("Phi3ForCausalLM", {"kinds": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}, True),
        ("Qwen3MoeForCausalLM", {"kinds": LLAMA[:4]}, True),
        ("Qwen3MoeForCausalLM", {"kinds": (*LLAMA[:4], "mlp.gate")}, None),
        ("Qwen3MoeForCausalLM", {}, None),
        ("DeepseekV3ForCausalLM", {"kinds": ("q_a_proj", "o_proj")}, None),
        ("GPTNeoXForCausalLM", {"kinds": ("query_key_value",), "prefix": "gpt_neox.layers"}, None),
        ("SmolLM3ForCausalLM", {}, None),
        ("FalconForCausalLM", {"kinds": ("query_key_value",)}, False),
        ("BloomForCausalLM", {"kinds": ("query_key_value",)}, False),
        ("Qwen3_5ForConditionalGeneration", {}, False),
        ("Gemma3ForConditionalGeneration", {}, False),
        ("Gemma3ForConditionalGeneration", {"prefix": "model.language_model.layers"}, None),
        ("Mistral3ForConditionalGeneration", {}, None),
        ("SomethingNew", {}, None),
        ("", {}, None),
    ],
)
def test_architectures_of_vllm(tmp_path: Path, architecture: str, adapter: dict[str, Any], serves: bool | None) -> None:
    found = verdict(adapter_of(tmp_path / "lora", **adapter), "vLLM", base_for(architecture))
    assert found.serves is serves, found.line


def test_heads(tmp_path: Path) -> None:
    """PEFT adds the base's own weight to the file of an adapter for the head."""
    factors = Factors(lora_b=torch.ones(8, 8), lora_a=torch.ones(8, 4))
    copy = {"base_model.model.lm_head.base_layer.weight": torch.ones(8, 4)}
    adapter = read_adapter(write_lora(tmp_path / "lora", {"lm_head": factors}, copy))
    assert [oddity.field for oddity in adapter.oddities] == ["base_layer"]
    untied, tied = base_for(config={"tie_word_embeddings": False}), base_for(config={"tie_word_embeddings": True})
    assert verdict(adapter, "vLLM", untied).serves is True
    assert verdict(adapter, "vLLM", tied).serves is None
    refused = verdict(adapter, "vLLM", base_for("MistralForCausalLM"))
    assert refused.serves is False and "adapts no lm_head" in refused.line
    plain = read_adapter(write_lora(tmp_path / "plain", {"lm_head": factors}))
    assert verdict(plain, "llama.cpp", untied).serves is True
    assert verdict(plain, "llama.cpp", tied).serves is False
    assert verdict(plain, "SGLang", untied).serves is None


@pytest.mark.parametrize(
    ("rank", "kept", "four_bits", "serves"),
    [(32, 2, True, None), (16, 2, True, True), (32, 1, True, True), (64, 2, False, True)],
)
def test_the_open_bug_of_vllm(tmp_path: Path, rank: int, kept: int, four_bits: bool, serves: bool | None) -> None:
    whole = adapter_of(tmp_path / "lora", (rank,))
    some = replace(
        whole, layers={name: layer for name, layer in whole.layers.items() if int(name.split(".")[2]) < kept}
    )
    found = verdict(some, "vLLM", base_for(method="compressed-tensors", has_4_bit_weights=four_bits))
    assert found.serves is serves and ("issues/50059" in found.line) is (serves is None)


@pytest.mark.parametrize(
    ("adapter", "base", "serves", "told"),
    [
        ({}, {}, True, "launch_server"),
        ({"ranks": (8, 16)}, {}, False, "layers of one rank"),
        ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 8}}, {}, True, "launch_server"),
        ({"alpha_pattern": {"q_proj": 16}}, {}, False, "scales all layers"),
        ({"r": 16, "rank_pattern": {".*": 8}}, {}, False, "layers of one rank"),
        ({"use_rslora": True}, {}, False, "scales all layers"),
        ({"lora_alpha": 4}, {}, True, "launch_server"),
        ({"target_modules": r".*_proj"}, {}, False, "pattern of names"),
        ({"target_modules": "all-linear"}, {}, True, "launch_server"),
        ({"use_dora": True}, {}, False, "DoRA"),
        ({"kinds": ("q_proj", "v_proj")}, {}, None, "self_attn.k_proj, one stack"),
        ({"kinds": ("up_proj", "down_proj")}, {}, None, "mlp.gate_proj, one stack"),
        ({"kinds": ("o_proj", "down_proj")}, {}, True, "launch_server"),
        ({"kinds": ("query_key_value",)}, {"architecture": "GPTNeoXForCausalLM"}, None, "GPTNeoXForCausalLM"),
        ({}, {"architecture": "Qwen3_5ForConditionalGeneration", "is_wrapped": True}, None, "Qwen3_5"),
        ({}, {"method": "bitsandbytes"}, None, "bitsandbytes"),
        ({}, {"method": "gptq"}, True, "launch_server"),
    ],
)
def test_sglang(tmp_path: Path, adapter: dict[str, Any], base: dict[str, Any], serves: bool | None, told: str) -> None:
    found = verdict(adapter_of(tmp_path / "lora", **adapter), "SGLang", base_for(**base))
    assert found.serves is serves and told in found.line


def test_a_padded_export_is_what_sglang_takes(tmp_path: Path) -> None:
    mixed = adapter_of(tmp_path / "mixed", (8, 20))
    assert verdict(mixed, "SGLang", base_for()).serves is False
    export_padded(mixed, tmp_path / "padded")
    assert verdict(read_adapter(tmp_path / "padded"), "SGLang", base_for()).serves is True


@pytest.mark.parametrize(
    ("adapter", "model_type", "method", "serves", "told"),
    [
        ({}, "llama", "gguf", True, "-m the/base --lora"),
        ({}, "llama", "dense", True, "convert the base"),
        ({}, "qwen3", "dense", True, "convert the base"),
        ({"ranks": (3, 8)}, "llama", "gguf", True, "--lora"),
        ({}, "gemma", "dense", None, "not known here"),
        ({"kinds": ("mystery",)}, "llama", "gguf", False, "no tensor for"),
        ({"prefix": "model.language_model.layers"}, "mistral", "dense", False, "no tensor for"),
        ({}, "llama", "gptq", None, "gptq"),
        ({"use_dora": True}, "llama", "gguf", False, "DoRA"),
    ],
)
def test_llama_cpp_is_what_the_export_knows(
    tmp_path: Path, adapter: dict[str, Any], model_type: str, method: str, serves: bool | None, told: str
) -> None:
    base = base_for(method=method)
    base.config.model_type = model_type
    made = adapter_of(tmp_path / "lora", **adapter)
    found = verdict(made, "llama.cpp", base)
    assert found.serves is serves and told in found.line
    if method != "gptq":
        with pytest.raises(ValueError, match=told) if serves is not True else nullcontext():
            export_gguf(made, base, tmp_path / "adapter.gguf")


def test_peft(tmp_path: Path) -> None:
    plain, dora = adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "dora", use_dora=True)
    assert verdict(dora, "PEFT", base_for(method="bitsandbytes")).serves
    assert verdict(plain, "PEFT", base_for("GPTNeoXForCausalLM")).serves
    assert verdict(plain, "PEFT", base_for(method="quanto")).serves is None


def test_without_a_base(tmp_path: Path) -> None:
    found = verdicts(adapter_of(tmp_path / "lora"), None)
    assert [verdict.runtime for verdict in found] == ["PEFT", "vLLM", "SGLang", "llama.cpp"]
    assert all(verdict.serves is None and "give the base with --base" in verdict.line for verdict in found)


def test_no_yes_after_a_fault(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "lora")
    assert all(found.serves for found in verdicts(adapter, base_for()))
    faulty = verdicts(adapter, base_for(), "it is another model")
    assert all(found.serves is None and "it is another model" in found.line for found in faulty)
    assert verdict(adapter, "vLLM", base_for(method="hqq"), "it is another model").serves is False


def test_4_bit_weights() -> None:
    scheme = {"weights": {"num_bits": 4, "type": "int"}, "input_activations": None}
    for stored, expected in [
        (None, False),
        ({"quant_method": "gptq", "bits": 4}, True),
        ({"quant_method": "gptq", "bits": 8}, False),
        ({"quant_method": "fp8"}, False),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": scheme}}, True),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {**scheme, "input_activations": {"num_bits": 8}}},
            },
            False,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            False,
        ),
    ]:
        assert has_4_bit_weights(LlamaConfig(quantization_config=stored)) is expected


def test_how_bases_are_stored(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "dense")
    assert read_base(str(tmp_path / "dense")).method == "dense"
    found = read_base(str(write_gguf(tmp_path / "tiny.gguf")))
    assert found.method == "gguf" and found.config.num_attention_heads == 4
    dense = read_base(str(tmp_path / "dense"))
    assert dense.architecture == "LlamaForCausalLM" and not dense.is_wrapped and not dense.has_4_bit_weights
    Qwen3VLConfig(architectures=["Qwen3VLForConditionalGeneration"]).save_pretrained(tmp_path / "wrapped")
    wrapped = read_base(str(tmp_path / "wrapped"))
    assert wrapped.architecture == "Qwen3VLForConditionalGeneration" and wrapped.is_wrapped
    for stored, method in [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"load_in_4bit": True}, "bitsandbytes")]:
        assert quantization_method(LlamaConfig(quantization_config=stored)) == method
    for name in ("nowhere/at-all", str(tmp_path / "none.gguf"), str(tmp_path)):
        with pytest.raises(ValueError, match=r"cannot load nowhere/at-all|no file|no config.json"):
            read_base(name, only_here=True)
