"""vLLM, read in version 0.32; formats of bases in 0.33.

- lora/peft_helper.py, PEFTHelper: which fields of a configuration are refused; ranks and scales may differ by layer.
- lora/lora_model.py, LoRAModel.from_local_checkpoint: an adapter with a module whose last name the model does not have
  is refused; a copy of the base's head or embedding is left out.
- lora/model_manager.py, activate_adapter: factors go to the modules of the model by their whole names, and those that
  no module has are dropped without a word. So the prefix counts: names are the checkpoint's, put through the model's
  `hf_to_vllm_mapper`, which for a text model inside a multimodal one expects `model.language_model.`.
- model_executor/models/registry.py and the classes there: which architectures have their own class, whether it has
  SupportsLoRA, its `packed_modules_mapping` and `embedding_modules`.
"""

from shlex import quote
from typing import TYPE_CHECKING

from longshadow.compress.adapters.reading import Adapter
from longshadow.compress.adapters.runtimes.answers import Answer, no, not_known, yes

if TYPE_CHECKING:
    from longshadow.compress.adapters.bases import Base

# Values of --max-lora-rank (config/lora.py).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
METHODS = {"auto-round", "awq", "compressed-tensors", "dense", "fp8", "gptq", "inc", "mxfp4", "quark", "torchao"}
MODULES_TO_SAVE = {"classifier", "score"}

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LLAMA = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
UNGATED = ATTENTION | {"up_proj", "down_proj"}
FUSED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
HEAD = {"lm_head"}
# Modules that a class adapts, where its decoder has transformers' names, `model.layers.N.`.
MODULES = {
    "ApertusForCausalLM": UNGATED | HEAD,
    "Cohere2ForCausalLM": LLAMA,
    "CohereForCausalLM": LLAMA,
    "Ernie4_5ForCausalLM": LLAMA | HEAD,
    "Exaone4ForCausalLM": LLAMA | HEAD,
    "Gemma2ForCausalLM": LLAMA,
    "Gemma3ForCausalLM": LLAMA,
    "GemmaForCausalLM": LLAMA,
    "GraniteForCausalLM": LLAMA | HEAD,
    "LlamaForCausalLM": LLAMA | HEAD,
    "Ministral3ForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "NemotronForCausalLM": UNGATED | HEAD,
    "Phi3ForCausalLM": FUSED | HEAD,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA | HEAD,
}
# The same of mixtures, of which only attention is sure: experts and routers are stored in several ways.
MIXTURES = {
    "GraniteMoeForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM",
}  # fmt: skip
# Classes without SupportsLoRA: the server does not start with --enable-lora.
WITHOUT_LORA = {
    "BloomForCausalLM", "Cohere2MoeForCausalLM", "Cohere2VisionForConditionalGeneration", "DbrxForCausalLM",
    "DeepseekV32ForCausalLM", "FalconForCausalLM", "FalconMambaForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM",
    "Gemma3nForCausalLM", "Gemma3nForConditionalGeneration", "GlmMoeDsaForCausalLM", "Mamba2ForCausalLM",
    "MambaForCausalLM", "OrionForCausalLM", "StableLmForCausalLM", "Zamba2ForCausalLM",
}  # fmt: skip
# Multimodal classes whose mapper renames `model.language_model.` alone: a text model's own names match nothing.
WRAPPERS = {
    "Gemma3ForConditionalGeneration", "Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration",
    "InternVLForConditionalGeneration", "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration",
    "PaliGemmaForConditionalGeneration", "Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
}  # fmt: skip
ISSUE = "https://github.com/vllm-project/vllm/issues/50059"


def vllm_rank(rank: int) -> int | None:
    """The smallest value of vLLM's --max-lora-rank that an adapter of that rank fits in; None beyond the largest."""
    return next((size for size in VLLM_RANKS if size >= rank), None)


def vllm_answer(adapter: Adapter, base: "Base") -> Answer:
    """Answers with a refusal before anything that is not known."""
    # It looks at the configuration's rank, too, whether a layer has it or not.
    rank = max(adapter.rank, int(adapter.config.get("r", 8)))
    size = vllm_rank(rank)
    reasons = [oddity.meaning for oddity in adapter.oddities if not _is_known_to_vllm(adapter, oddity.field)]
    if size is None:
        reasons.append(f"its rank {rank} is above vLLM's largest, {VLLM_RANKS[-1]}")
    if base.method in ("bitsandbytes", "gguf"):
        reasons.append(f"vLLM has loaded no {base.method} models since 0.33")
    elif base.method not in METHODS and not base.method.startswith("modelopt"):
        reasons.append(f"vLLM loads no {base.method} models")
    reasons += _reasons_of_the_class(adapter, base)
    if reasons:
        return no("; ".join(reasons))
    modules = quote(f"adapter={adapter.folder}")
    command = f"vllm serve {quote(base.name)} --enable-lora --max-lora-rank {size} --lora-modules {modules}"
    if doubt := _doubt(adapter, base, rank):
        return not_known(f"{doubt}: {command}")
    uneven = min(layer.rank for layer in adapter.layers.values()) < adapter.rank
    return yes(f"{command}{f'  (every layer takes the memory of rank {size})' if uneven else ''}")


def _is_known_to_vllm(adapter: Adapter, field: str) -> bool:
    # It has no transposed layers, so that PEFT's flag for them says nothing to it.
    saved = adapter.config.get("modules_to_save") or ["something that the configuration does not name"]
    return field in ("fan_in_fan_out", "base_layer") or (field == "modules_to_save" and set(saved) <= MODULES_TO_SAVE)


def _reasons_of_the_class(adapter: Adapter, base: "Base") -> list[str]:
    architecture = base.architecture
    if architecture in WITHOUT_LORA:
        return [f"vLLM has no adapters for {architecture}"]
    if architecture in WRAPPERS:
        lost = [name for name in adapter.layers if name.startswith("model.layers.")]
    elif architecture in MODULES:
        for name in adapter.layers:
            if name.rpartition(".")[2] not in MODULES[architecture]:
                return [f"vLLM's {architecture} adapts no {name.rpartition('.')[2]}"]
        lost = [name for name in adapter.layers if not name.startswith(("model.layers.", "lm_head"))]
    else:
        lost = []
    return [f"vLLM's {architecture} has no module {name}, and drops what is for it without a word" for name in lost[:1]]


def _doubt(adapter: Adapter, base: "Base", rank: int) -> str:
    """Why a yes would not be sure; empty where it is."""
    architecture = base.architecture
    kinds = {name.rpartition(".")[2] for name in adapter.layers}
    if architecture in MIXTURES:
        if not kinds <= ATTENTION:
            return f"whether vLLM's {architecture} adapts {min(kinds - ATTENTION)} was not tried"
    elif architecture not in MODULES:
        return f"whether vLLM's modules have the names of {architecture or 'this base'} was not tried; --run does"
    if "lm_head" in kinds and base.config.tie_word_embeddings:
        return "what vLLM does with factors of a head that is the embedding was not tried"
    blocks = {match for name in adapter.layers if (match := _block(name))}
    if base.has_4_bit_weights and rank >= 32 and len(blocks) == base.config.num_hidden_layers:
        return (
            "vLLM's outputs are reported to be weak, and not the same twice, with rank 32 or more in all layers of a "
            f"base with 4-bit weights and 16-bit activations ({ISSUE}, open): compare with PEFT's, or use less rank"
        )
    return ""


def _block(name: str) -> str:
    """The number of a decoder block, from the name of a layer in it."""
    return name.partition(".layers.")[2].partition(".")[0]
