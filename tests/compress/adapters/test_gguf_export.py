"""The file for llama.cpp: read back, and its products added to weights as llama.cpp has them.

The truths for the order of rows are files: SmolLM2's, made by llama.cpp's own converter, and tiny ones that
transformers reads.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, Qwen2Config, Qwen3Config

from longshadow import model_sources
from longshadow.compress.adapters.bases import Base, read_base
from longshadow.compress.adapters.files import save_adapter
from longshadow.compress.adapters.gguf_export import ARCHITECTURES, arranged_b, export_gguf
from longshadow.compress.adapters.reading import Adapter, read_adapter
from longshadow.compress.solver import Factors
from longshadow.gguf_files import load_gguf
from longshadow.models import LoadedModel
from tests.compress.adapters.lora_files import factors_for, with_products, write_lora
from tests.tiny_models import tiny_model, write_gguf


def tiny_base() -> Base:
    return Base(name="tiny", method="dense", config=tiny_model().config)


def read_gguf(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    return {t.name: t.data for t in reader.tensors}, {key: field.contents() for key, field in reader.fields.items()}


def products_in(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """B A of every tensor, as llama.cpp multiplies with alpha 0."""
    tensors, fields = read_gguf(path)
    assert fields["adapter.lora.alpha"] == 0
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    return {name: tensors[f"{name}.lora_b"].astype("f8") @ tensors[f"{name}.lora_a"].astype("f8") for name in names}


def test_what_the_file_says(tmp_path: Path) -> None:
    layers = factors_for(tiny_model(), dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", layers, base_model="m")
    told = export_gguf(read_adapter(tmp_path / "adapter"), tiny_base(), tmp_path / "adapter.gguf", torch.float32)
    tensors, fields = read_gguf(tmp_path / "adapter.gguf")
    assert fields["general.type"] == "adapter" and fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 0
    assert len(tensors) == 2 * len(layers) == 2 * told.layers
    assert told.num_bytes == (tmp_path / "adapter.gguf").stat().st_size and told.detail == "factors as they are"
    names = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down"}
    for ours, theirs in names.items():
        factors = layers[f"model.layers.1.{ours}"]
        a, b = tensors[f"blk.1.{theirs}.weight.lora_a"], tensors[f"blk.1.{theirs}.weight.lora_b"]
        assert a.dtype == b.dtype == np.float32
        assert torch.equal(torch.tensor(a), factors.lora_a.float()) and a.shape == (factors.rank, a.shape[1])
        assert torch.equal(torch.tensor(b), factors.lora_b.float())
    for kind, theirs, heads in [("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)]:
        b = tensors[f"blk.0.{theirs}.weight.lora_b"]
        # Row 2i + j of a head in llama.cpp is row i of its half j.
        restored = b.reshape(heads, -1, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
        expected = layers[f"model.layers.0.self_attn.{kind}"].lora_b.float()
        assert torch.equal(torch.tensor(restored), expected) and not torch.equal(torch.tensor(b), expected)


@torch.no_grad()
def test_transformers_reads_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF file whose weights have the exported products added is the model with B A in its weights."""
    layers = factors_for(tiny_model(), ranks=(8,))
    write_lora(tmp_path / "lora", layers, lora_alpha=12)
    export_gguf(read_adapter(tmp_path / "lora"), tiny_base(), tmp_path / "adapter.gguf")
    products = products_in(tmp_path / "adapter.gguf")
    written = []

    class AddingWriter(gguf.GGUFWriter):
        def add_tensor(self, name: str, tensor: np.ndarray[Any, Any], *_: Any, **__: Any) -> None:
            written.append(name)
            super().add_tensor(name, (tensor + products.get(name, 0)).astype(np.float32))

    monkeypatch.setattr(gguf, "GGUFWriter", AddingWriter)
    path = write_gguf(tmp_path / "sum.gguf")
    assert products.keys() <= set(written) and len(products) == 14
    model, _ = load_gguf(path, dtype=torch.float32, device=torch.device("cpu"))
    expected = with_products(tiny_model(), (layers, dict.fromkeys(layers, 1.5))).state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5)


def test_rows_are_those_of_a_real_file(smollm2: LoadedModel) -> None:
    """W = W I through the export's arrangement is the tensor that llama.cpp's converter wrote."""
    reader = gguf.GGUFReader(model_sources._demo_source()[0])
    real = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    base = Base(name="SmolLM2", method="gguf", config=smollm2.model.config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layer = f"model.layers.17.self_attn.{name}"
        weight = smollm2.model.get_submodule(layer).weight
        assert isinstance(weight, torch.Tensor)
        whole = Factors(lora_b=weight.detach(), lora_a=torch.eye(weight.shape[1]))
        assert np.array_equal(arranged_b(whole, layer, base).numpy(), real[f"{names.get_name(layer)}.weight"])


QWEN_SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


# transformers does not read the heads' width of a Qwen3 file, but takes it to be 128.
@pytest.mark.parametrize(
    "config", [Qwen2Config(**QWEN_SIZES), Qwen3Config(**QWEN_SIZES, head_dim=128)], ids=["qwen2", "qwen3"]
)
@torch.no_grad()
def test_architectures_without_interleaved_rows(tmp_path: Path, config: Any) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    layers = factors_for(model)
    save_adapter(tmp_path / "adapter", layers, base_model="m")
    base = Base(name="tiny", method="dense", config=config)
    export_gguf(read_adapter(tmp_path / "adapter"), base, tmp_path / "adapter.gguf")
    path = write_with_products(tmp_path / "sum.gguf", model, products_in(tmp_path / "adapter.gguf"))
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    expected = with_products(model, (layers, dict.fromkeys(layers, 1))).state_dict()
    for name, weight in read.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5)


def write_with_products(path: Path, model: Any, products: dict[str, np.ndarray[Any, Any]]) -> Path:
    """The model with `products` added to its tensors, in the plain order of rows."""
    kind = model.config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(32)
    [arch] = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind]
    names, unused = gguf.get_tensor_name_map(arch, 2), set(products)
    for name, weight in model.state_dict().items():
        tensor = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name != "lm_head.weight":
            writer.add_tensor(tensor, (weight.numpy() + products.get(tensor, 0)).astype(np.float32))
            unused.discard(tensor)
    assert not unused
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_16_bit_adapters_become_float16(tmp_path: Path) -> None:
    layers = factors_for(tiny_model(), dtype=torch.bfloat16)
    next(iter(layers.values())).lora_a[0, 0] = 2.0**-26  # below float16's smallest number
    save_adapter(tmp_path / "adapter", layers, base_model="m")
    told = export_gguf(read_adapter(tmp_path / "adapter"), tiny_base(), tmp_path / "adapter.gguf")
    tensors, _ = read_gguf(tmp_path / "adapter.gguf")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float16")}
    assert told.dtype == "float16" and told.detail.startswith("factors rounded by ")


def exported(adapter: Adapter, tmp_path: Path, base: Base | None = None, dtype: torch.dtype | None = None) -> None:
    export_gguf(adapter, base or tiny_base(), tmp_path / "out.gguf", dtype)


def test_mistakes(tmp_path: Path) -> None:
    layers = factors_for(tiny_model(), ranks=(8,))
    plain = read_adapter(write_lora(tmp_path / "plain", layers))
    dora = read_adapter(write_lora(tmp_path / "dora", layers, use_dora=True))
    square = Factors(lora_b=torch.ones(36, 8), lora_a=torch.ones(8, 36))
    odd = read_adapter(write_lora(tmp_path / "odd", {"model.layers.0.self_attn.q_proj": square}))
    unknown = read_adapter(write_lora(tmp_path / "unknown", {"model.layers.0.mystery": square}))
    head = read_adapter(write_lora(tmp_path / "head", {"lm_head": square}))
    large = {"model.layers.0.mlp.up_proj": Factors(lora_b=torch.full((4, 8), 1e6), lora_a=torch.ones(8, 4))}
    too_large = read_adapter(write_lora(tmp_path / "large", large))
    gemma = Base(name="gemma", method="dense", config=LlamaConfig())
    gemma.config.model_type = "gemma"
    cases: list[tuple[Adapter, dict[str, Any], str]] = [
        (plain, {"base": gemma}, "how llama.cpp lays out gemma models is not known"),
        (plain, {"dtype": torch.bfloat16}, "float16 or float32, not bfloat16"),
        (dora, {}, "DoRA"),
        (odd, {}, "36 outputs, which are no 4 heads"),
        (unknown, {}, "no tensor for model.layers.0.mystery"),
        (head, {}, "no tensor for lm_head"),
        (too_large, {"dtype": torch.float16}, "does not fit the range of float16"),
    ]
    for adapter, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            exported(adapter, tmp_path, **arguments)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))
    exported(plain, tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        exported(plain, tmp_path)


def test_the_table_names_gguf_architectures() -> None:
    assert {architecture.name for architecture in ARCHITECTURES.values()} <= set(gguf.MODEL_ARCH_NAMES.values())


def test_the_base_may_be_a_gguf_file(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", factors_for(tiny_model()), base_model="m")
    path = write_gguf(tmp_path / "tiny.gguf")
    for name, base in [("a.gguf", read_base(str(path))), ("b.gguf", tiny_base())]:
        export_gguf(read_adapter(tmp_path / "adapter"), base, tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
