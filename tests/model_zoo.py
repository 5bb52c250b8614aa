"""Tiny random models of the causal-LM types that the installed transformers has, for differential sweeps.

`tiny_model(name)` builds one. Sizes that many configurations name alike are shrunk by name (`SIZES`), in nested
configurations too; `SHRINKERS` holds what a type needs beyond that, and `NOT_BUILT` why a type is left out.
`harden` makes attention peaked, and norms, biases and sinks other than their initial values, as training does:
with them mistakes show.
"""

import warnings
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
NUM_LAYERS = 2
TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Given to every configuration, whether or not its own defaults name them.
COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    pad_token_id=0,
    eos_token_id=None,
    bos_token_id=1,
)
# Given to configurations whose defaults name them.
SIZES: dict[str, Any] = dict(
    head_dim=16,
    sliding_window=24,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    shared_intermediate_size=32,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_k=2,
    moe_topk=2,
    top_k_experts=2,
    num_shared_experts=1,
    n_shared_experts=1,
    moe_num_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    num_dense_layers=1,
    kv_lora_rank=16,
    q_lora_rank=32,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    index_head_dim=16,
    index_n_heads=2,
    index_topk=16,
    d_model=64,
    n_embd=64,
    d_ff=64,
    dff=64,
    dim_ff=64,
    dim_head=16,
    ffn_dim=64,
    encoder_layers=NUM_LAYERS,
    decoder_layers=NUM_LAYERS,
    num_encoder_layers=NUM_LAYERS,
    num_decoder_layers=NUM_LAYERS,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    num_encoder_attention_heads=4,
    num_decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    mamba_num_heads=8,
    mamba_head_dim=16,
    ssm_state_size=16,
    mamba_d_state=16,
    vocab_size_per_layer_input=VOCABULARY,
    hidden_size_per_layer_input=16,
    num_kv_shared_layers=0,
    is_decoder=True,
)
_LATENT = dict(num_key_value_heads=4, head_dim=8)
_RECURRENT = dict(mamba_n_heads=8, mamba_d_head=16, mamba_chunk_size=16)
SHRINKERS: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": dict(
        n_group=1, topk_group=1, num_experts_per_tok=2, partial_rotary_factor=1.0, linear_num_heads=4, **_LATENT
    ),
    "bamba": dict(attn_layer_indices=[1], **_RECURRENT),
    "codegen": dict(rotary_dim=8),
    # The default angles of its full attention are sized for large heads.
    "cohere_compass_text": dict(
        rope_parameters={
            "full_attention": dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2]),
            "sliding_attention": None,
        }
    ),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0), ffn_config=dict(ffn_hidden_size=32)),
    "deepseek_v2": dict(num_experts_per_tok=2, **_LATENT),
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1),
    "dots3_note_text": dict(per_layer_config=None, num_key_value_heads=4),
    "exaone4": dict(layer_types=["sliding_attention", "full_attention"], sliding_window=24),
    "falcon_h1": dict(mamba_d_ssm=128, **_RECURRENT),
    "gemma3n_text": dict(
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=24),
    "gptj": dict(rotary_dim=8),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"], **_RECURRENT),
    "hunyuan_v1_dense": dict(head_dim=16),
    "hunyuan_v1_moe": dict(head_dim=16),
    "inkling2_text": dict(swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16),
    "inkling_text": dict(swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=8),
    "kimi_linear": dict(num_experts_per_token=2, linear_head_dim=16, linear_num_heads=4, **_LATENT),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "longcat_flash": dict(num_layers=1, ffn_hidden_size=64, expert_ffn_hidden_size=32, zero_expert_num=2, **_LATENT),
    "mamba2": dict(num_heads=8, head_dim=16, state_size=16, n_groups=1, chunk_size=16),
    "minicpm3": _LATENT,
    "mistral": dict(sliding_window=None),
    "ministral": dict(head_dim=16, layer_types=["full_attention", "sliding_attention"], sliding_window=24),
    "qwen4_exp_text": dict(
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=16,
        indexer_compress_ratio=4,
        ngram_vocab_size_base=100,
        split_ngram_parts=2,
        ple_embed_dim=16,
        hc_lowrank=8,
    ),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"], lru_width=64, attention_window_size=24),
    "reformer": dict(
        is_decoder=True,
        axial_pos_shape=[32, 32],
        axial_pos_embds_dim=[32, 32],
        attention_head_size=16,
        feed_forward_size=64,
        attn_layers=["local", "lsh"],
    ),
    "roc_bert": dict(pronunciation_embed_dim=16, shape_embed_dim=16, pronunciation_vocab_size=16, shape_vocab_size=16),
    "xmod": dict(default_language="en_XX"),
    "youtu": _LATENT,
    "zamba": dict(layers_block_type=["linear_attention", "hybrid"] * 2, num_hidden_layers=4, mamba_dt_rank=8),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid"] * 2, num_hidden_layers=4),
    "zaya": dict(num_experts_per_tok=1),
}
_ANOTHER_MODELS_HEAD = "it drafts for another model and needs that model's hidden states"
_OTHER_NAMES = "its configuration refuses the common names of sizes"
_COMPOSITE = "its class takes the decoder's part of the type's configuration only"
NOT_BUILT: dict[str, str] = {
    "blt": "its byte patcher is a model of its own that would have to be shrunk separately",
    "dots3_note": "the sizes of its adapters are tied to those of its towers; its text model is built",
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": _ANOTHER_MODELS_HEAD,
    "gemma4_unified_assistant": _ANOTHER_MODELS_HEAD,
    "musicgen": _COMPOSITE,
    "musicgen_melody": _COMPOSITE,
    "prophetnet": _OTHER_NAMES,
    "xlnet": _OTHER_NAMES,
    "xlstm": "transformers' fallback kernel fails on small heads",
}

# Parts of the names of weights that make queries and keys.
QUERY_KEY = ("q_proj", "k_proj", "qkv_proj", "query_key_value", "qkv", "Wqkv", "c_attn")


def tiny_config(name: str, **overrides: Any) -> Any:
    """A configuration of a type with everything small."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = _shrunk(AutoConfig.for_model(name).to_dict())
        return AutoConfig.for_model(name, **{**sizes, **SHRINKERS.get(name, {}), **overrides})


def _shrunk(defaults: dict[str, Any]) -> dict[str, Any]:
    """`COMMON`, what of `SIZES` the defaults name, one layer of each kind, and the same for nested configurations."""
    sizes = {**COMMON, "num_hidden_layers": NUM_LAYERS}
    sizes |= {name: size for name, size in SIZES.items() if isinstance(defaults.get(name), int)}
    kinds = defaults.get("layer_types")
    if kinds:
        unique = list(dict.fromkeys(kinds))
        sizes["layer_types"] = unique if len(unique) >= NUM_LAYERS else unique * NUM_LAYERS
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    if defaults.get("mlp_layer_types"):
        unique = list(dict.fromkeys(defaults["mlp_layer_types"]))
        sizes["mlp_layer_types"] = (unique * sizes["num_hidden_layers"])[: sizes["num_hidden_layers"]]
    for name, nested in defaults.items():
        if name.endswith("_config") and isinstance(nested, dict) and "model_type" in nested:
            sizes[name] = {**_shrunk(nested), **SHRINKERS.get(nested["model_type"], {})}
    return sizes


def tiny_model(name: str, attention: str = "eager", **overrides: Any) -> PreTrainedModel:
    """A hardened random model in eval mode and fp32, the same each time."""
    config = tiny_config(name, **overrides)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().float()
    return harden(model)


def harden(model: PreTrainedModel) -> PreTrainedModel:
    """Changes initial weights into ones that show mistakes; returns the model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in QUERY_KEY) and parameter.dim() == 2:
                parameter.mul_(8)
            elif "norm" in name and parameter.dim() == 1:
                parameter.add_((torch.rand(parameter.shape, generator=generator) - 0.5) * 0.8)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "sink" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model
