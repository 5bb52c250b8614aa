"""SGLang, read at 00639c4d (2026).

Of python/sglang/srt/lora:
- mem_pool.py, load_lora_weight_to_buffer: every A must have r rows for each of its stacked parts, r of the
  configuration, and every B r columns; another shape fails an assertion when the adapter is first used.
- lora.py: one scale for all layers, lora_alpha / r; patterns and `use_rslora` change nothing.
- lora_manager.py, validate_new_adapter: no DoRA. utils.py, get_normalized_target_modules: a pattern of names as
  `target_modules` is refused; q, k and v are one module, and so are gate and up.
"""

from collections import defaultdict
from shlex import quote
from typing import TYPE_CHECKING

from longshadow.compress.adapters.reading import Adapter
from longshadow.compress.adapters.runtimes.answers import Answer, no, not_known, yes

if TYPE_CHECKING:
    from longshadow.compress.adapters.bases import Base

METHODS = {"awq", "compressed-tensors", "dense", "fp8", "gptq"}
# Whose decoder has the names of transformers' Llama in SGLang, too (srt/models).
ARCHITECTURES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
STACKED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
PADDED = "adapter export --to padded makes one that it takes"


def sglang_answer(adapter: Adapter, base: "Base") -> Answer:
    """A yes only for what is sure in the code above."""
    if adapter.oddities:
        return no(adapter.oddities[0].meaning)
    targets = adapter.config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        return no("SGLang refuses a pattern of names as target_modules; " + PADDED)
    rank, alpha = adapter.config.get("r", 8), adapter.config.get("lora_alpha", 8)
    for name, layer in adapter.layers.items():
        if layer.rank != rank:
            return no(f"SGLang takes layers of one rank, and {name} has {layer.rank}, not r = {rank}: {PADDED}")
        if layer.scale != alpha / rank:
            return no(f"SGLang scales all layers by lora_alpha / r, and {name} by {layer.scale:g}: {PADDED}")
    architecture = base.architecture
    if architecture not in ARCHITECTURES or base.is_wrapped:
        return not_known(f"what SGLang does with adapters on {architecture or 'this base'} was not tried")
    if base.method not in METHODS:
        return not_known(f"whether SGLang puts adapters on {base.method} models was not tried")
    kinds = defaultdict(set)
    for name in adapter.layers:
        parent, _, kind = name.rpartition(".")
        if kind not in MODULES or not name.startswith("model.layers."):
            return not_known(f"whether SGLang adapts {name} was not tried")
        kinds[parent].add(kind)
    for parent, present in kinds.items():
        for stack in STACKED:
            if present & stack and not stack <= present:
                missing = min(stack - present)
                return not_known(f"what SGLang does without factors for {parent}.{missing}, one stack, was not tried")
    paths = quote(f"adapter={adapter.folder}")
    return yes(f"python -m sglang.launch_server --model-path {quote(base.name)} --lora-paths {paths}")
