"""Which runtimes can serve an adapter on its base, by their own rules.

Read in PEFT 0.21, vLLM 0.33, SGLang of November 2026 and llama.cpp of the same time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING

from longshadow.compress.adapters.reading import Adapter
from longshadow.compress.adapters.scales import layer_rank, layer_scale

if TYPE_CHECKING:
    from longshadow.compress.adapters.bases import Base

# vLLM's values of --max-lora-rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_METHODS = {"awq", "gptq", "fp8", "compressed-tensors", "torchao", "inc", "auto-round", "quark", "mxfp4"}
VLLM_MODULES_TO_SAVE = {"classifier", "score"}
PEFT_METHODS = {"bitsandbytes", "gptq", "awq", "hqq", "aqlm", "eetq", "torchao", "inc", "auto-round"}
SGLANG_METHODS = {"awq", "gptq", "fp8", "compressed-tensors"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One runtime.

    Attributes:
        serves: None where its rules do not tell.
        line: what to run, or why it cannot.
    """

    runtime: str
    serves: bool | None
    line: str


def verdicts(adapter: Adapter, base: "Base | None") -> list[Verdict]:
    """One of each runtime. Without a base none can be sure to serve it, and how is told as for a dense one."""
    rules: dict[str, Callable[[Adapter, str, str], tuple[bool | None, str]]] = {
        "PEFT": _peft,
        "vLLM": _vllm,
        "SGLang": _sglang,
        "llama.cpp": _llama_cpp,
    }
    method, name = (base.method, base.name) if base is not None else ("dense", adapter.base_model or "BASE")
    found = []
    for runtime, rule in rules.items():
        serves, line = rule(adapter, method, name)
        if base is None and serves:
            serves, line = None, f"if it loads the base: {line}"
        found.append(Verdict(runtime=runtime, serves=serves, line=line))
    return found


def vllm_rank(rank: int) -> int | None:
    """The smallest value of vLLM's --max-lora-rank that an adapter of that rank fits in; None beyond the largest."""
    return next((size for size in VLLM_RANKS if size >= rank), None)


def _peft(adapter: Adapter, method: str, name: str) -> tuple[bool | None, str]:
    call = f'PeftModel.from_pretrained(model, "{adapter.folder}", autocast_adapter_dtype=False)'
    if method in PEFT_METHODS or method in ("dense", "gguf"):  # transformers makes a GGUF file's blocks dense
        return True, f"{call}; without the last argument a 16-bit adapter takes twice its size"
    return None, f"PEFT has no layer of its own for {method}; its default one may do: {call}"


def _vllm(adapter: Adapter, method: str, name: str) -> tuple[bool | None, str]:
    reasons = [oddity.meaning for oddity in adapter.oddities if not _is_known_to_vllm(adapter, oddity.field)]
    # It looks at the configuration's rank, too, whether a layer has it or not.
    rank = max(adapter.rank, int(adapter.config.get("r", 0)))
    size = vllm_rank(rank)
    if size is None:
        reasons.append(f"its rank {rank} is above vLLM's largest, {VLLM_RANKS[-1]}")
    if method in ("bitsandbytes", "gguf"):
        reasons.append(f"vLLM has loaded no {method} models since 0.33")
    elif method not in VLLM_METHODS and method != "dense" and not method.startswith("modelopt"):
        reasons.append(f"vLLM loads no {method} models")
    if reasons:
        return False, "; ".join(reasons)
    modules = quote(f"adapter={adapter.folder}")
    command = f"vllm serve {quote(name)} --enable-lora --max-lora-rank {size} --lora-modules {modules}"
    uneven = min(layer.rank for layer in adapter.layers.values()) < adapter.rank
    return True, f"{command}{f'  (every layer takes the memory of rank {size})' if uneven else ''}"


def _is_known_to_vllm(adapter: Adapter, field: str) -> bool:
    # It has no transposed layers, so that PEFT's flag for them says nothing to it.
    saved = adapter.config.get("modules_to_save") or ["something that the configuration does not name"]
    return field == "fan_in_fan_out" or (field == "modules_to_save" and set(saved) <= VLLM_MODULES_TO_SAVE)


def _sglang(adapter: Adapter, method: str, name: str) -> tuple[bool | None, str]:
    if adapter.oddities:
        return False, adapter.oddities[0].meaning
    if method not in SGLANG_METHODS and method != "dense":
        return None, f"whether SGLang puts adapters on {method} models is not known here"
    paths = quote(f"adapter={adapter.folder}")
    command = f"python -m sglang.launch_server --model-path {quote(name)} --lora-paths {paths}"
    note = "  (older versions ignore patterns: adapter export --to padded)" if _needs_patterns(adapter) else ""
    return True, f"{command}{note}"


def _needs_patterns(adapter: Adapter) -> bool:
    """Whether a layer has another rank or scale than the configuration gives to all."""
    common = {**adapter.config, "rank_pattern": {}, "alpha_pattern": {}}
    return any(
        (layer.rank, layer.scale) != (layer_rank(common, name), layer_scale(common, name))
        for name, layer in adapter.layers.items()
    )


def _llama_cpp(adapter: Adapter, method: str, name: str) -> tuple[bool | None, str]:
    if adapter.oddities:
        return False, adapter.oddities[0].meaning
    if method not in ("gguf", "dense"):
        return False, f"llama.cpp runs GGUF files, and a {method} model's weights are in none"
    model, folder = quote(name) if method == "gguf" else "BASE.gguf", quote(str(adapter.folder))
    export = f"longshadow adapter export {folder} --to gguf --output adapter.gguf --base {quote(name)}"
    converted = "" if method == "gguf" else "convert the base to BASE.gguf, "
    return True, f"{converted}{export}, llama-server -m {model} --lora adapter.gguf"
