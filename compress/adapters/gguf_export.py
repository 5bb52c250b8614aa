"""`longshadow adapter export --to gguf`: the file that llama.cpp takes as `--lora`.

Legend: n inputs of a layer, m outputs, r rank.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys, LlamaFileType, TensorNameMap, get_tensor_name_map

from longshadow.compress.adapters.atomic import whole_file
from longshadow.compress.adapters.bases import Base
from longshadow.compress.adapters.exported import Exported
from longshadow.compress.adapters.reading import Adapter
from longshadow.compress.solver import Factors

FILE_TYPES = {torch.float16: LlamaFileType.MOSTLY_F16, torch.float32: LlamaFileType.ALL_F32}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp keeps a model of transformers.

    Attributes:
        name: llama.cpp's.
        interleaved: whether the rows of a head's queries and keys are reordered for a rotation of neighbours.
    """

    name: str
    interleaved: bool


# By transformers' model_type. Only those whose rows were compared with files of llama.cpp's own converter.
ARCHITECTURES = {
    "llama": Architecture(name="llama", interleaved=True),
    "mistral": Architecture(name="llama", interleaved=True),
    "qwen2": Architecture(name="qwen2", interleaved=False),
    "qwen3": Architecture(name="qwen3", interleaved=False),
}


class UnknownArchitecture(ValueError):
    """llama.cpp may have the architecture, but how it lays it out is not known here."""


def export_gguf(adapter: Adapter, base: Base, output: Path, dtype: torch.dtype | None = None) -> Exported:
    """Writes `NAME.weight.lora_a` [r, n] and `NAME.weight.lora_b` [m, r] for llama.cpp's name of each layer.

    llama.cpp multiplies B A by alpha / r, or by 1 where alpha is 0. The scales are in B, and alpha is 0, which is right
    for layers of any ranks.

    Args:
        base: whose names and heads llama.cpp knows; its configuration is enough.
        dtype: float16 or float32; default: float16 for a 16-bit adapter.

    Raises ValueError for an adapter that is no plain one, an architecture whose layout is not known here, a layer that
    llama.cpp has no tensor for, factors that float16 does not hold, and where the output exists.
    """
    adapter.require_plain()
    names, architecture = tensor_names(adapter, base), architecture_of(base)
    dtype = dtype or (torch.float16 if adapter.dtype.itemsize == 2 else torch.float32)
    if dtype not in FILE_TYPES:
        raise ValueError(f"llama.cpp takes adapters in float16 or float32, not {str(dtype).removeprefix('torch.')}")
    tensors, rounding = {}, 0.0
    for name, tensor in names.items():
        exact, factors = adapter.folded(name, torch.float64), adapter.folded(name, dtype)
        rounding = max(rounding, _rounding(factors.lora_b, exact.lora_b), _rounding(factors.lora_a, exact.lora_a))
        tensors[f"{tensor}.lora_a"] = factors.lora_a
        tensors[f"{tensor}.lora_b"] = arranged_b(factors, name, base)
    with whole_file(output) as partial:
        writer = GGUFWriter(partial, architecture.name)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_name(adapter.folder.absolute().name)
        writer.add_file_type(FILE_TYPES[dtype])
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, 0.0)
        for tensor, values in tensors.items():
            writer.add_tensor(tensor, values.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Exported(
        format="gguf",
        output=str(output),
        layers=len(adapter.layers),
        dtype=str(dtype).removeprefix("torch."),
        num_bytes=output.stat().st_size,
        detail=f"factors rounded by {rounding:.1e} at most" if rounding else "factors as they are",
    )


def tensor_names(adapter: Adapter, base: Base) -> dict[str, str]:
    """llama.cpp's names of the adapter's layers.

    Raises UnknownArchitecture for one that is not in the table, ValueError for a layer that it has no tensor for, or
    that has another number of outputs than the base's heads.
    """
    architecture = architecture_of(base)
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = get_tensor_name_map(arch, base.config.num_hidden_layers)
    for name, layer in adapter.layers.items():
        _check_heads(name, layer.num_outputs, base)
    return {name: _tensor_name(names, name, base) for name in adapter.layers}


def architecture_of(base: Base) -> Architecture:
    """Raises UnknownArchitecture for one that is not in the table."""
    model_type = str(base.config.model_type)
    if model_type not in ARCHITECTURES:
        raise UnknownArchitecture(
            f"how llama.cpp lays out {model_type} models is not known here (known: {', '.join(ARCHITECTURES)}): "
            "use llama.cpp's convert_lora_to_gguf.py"
        )
    return ARCHITECTURES[model_type]


def arranged_b(factors: Factors, name: str, base: Base) -> torch.Tensor:
    """B [m, r] with its rows in llama.cpp's order.

    transformers rotates row i of a head's first half with row i of its second; llama.cpp's llama rotates rows 2i and
    2i + 1, and its converter moves the rows of queries and keys there.
    """
    num_heads = _interleaved_heads(name, base)
    if num_heads is None:
        return factors.lora_b
    halves = factors.lora_b.view(num_heads, 2, -1, factors.rank)
    return halves.transpose(1, 2).reshape(factors.lora_b.shape)


def _interleaved_heads(name: str, base: Base) -> int | None:
    """Heads whose rows llama.cpp has in another order; None for a layer that stays."""
    kind = name.rpartition(".")[2]
    if not architecture_of(base).interleaved or kind not in ("q_proj", "k_proj"):
        return None
    num_heads: int = base.config.num_attention_heads
    return (getattr(base.config, "num_key_value_heads", None) or num_heads) if kind == "k_proj" else num_heads


def _check_heads(name: str, num_outputs: int, base: Base) -> None:
    num_heads = _interleaved_heads(name, base)
    if num_heads is not None and num_outputs % (2 * num_heads):
        raise ValueError(f"{name} has {num_outputs} outputs, which are no {num_heads} heads of {base.name}")


def _tensor_name(names: TensorNameMap, name: str, base: Base) -> str:
    tensor = names.get_name(name)
    # A head that is the embedding has no tensor of its own in the file.
    if tensor is None or (tensor == "output" and base.config.tie_word_embeddings):
        raise ValueError(
            f"{base.name} has no tensor for {name} in llama.cpp's layout: leave the layer out of the adapter"
        )
    return f"{tensor}.weight"


def _rounding(cast: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error of a factor, as a norm."""
    norm = float(exact.norm())
    return float((cast.double() - exact).norm()) / norm if norm else 0.0
