"""A random two-layer Llama over bytes, as a model folder and as a GGUF file, written in a moment."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from gguf import GGUFWriter

END = "<|end|>"
MAX_POSITIONS = 4096
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 4, 2, 8
KEY_WIDTH = NUM_KV_HEADS * HEAD_DIM
HIDDEN = NUM_HEADS * HEAD_DIM
MERGE = ("t", "h")  # a GGUF's tokenizer needs one
TOKENS = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), "".join(MERGE)]


def write_folder(folder: Path, *, chat_template: str | None = None) -> Path:
    """Model and tokenizer in the layout of the hub."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder


def tiny_model() -> LlamaForCausalLM:
    """Random, but the same each time; it has no end token, so it generates as long as it may."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, and one for "th"."""
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[MERGE]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = chat_template
    return fast


def write_gguf(path: Path, *, architecture: str = "llama") -> Path:
    """The same model as a GGUF file; with a foreign `architecture`, its header alone. Skips without gguf."""
    writer: GGUFWriter = pytest.importorskip("gguf").GGUFWriter(path, architecture)
    writer.add_block_count(NUM_LAYERS)
    if architecture == "llama":
        _add_llama(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_llama(writer: "GGUFWriter") -> None:
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))  # 3 control, 1 normal
    writer.add_token_merges([" ".join(MERGE)])
    writer.add_eos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    model = tiny_model().model
    writer.add_tensor("token_embd.weight", model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.norm.weight.detach().numpy())
    for index, layer in enumerate(model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight.detach()
            if theirs in ("attn_q", "attn_k"):
                weight = _interleaved(weight)
            writer.add_tensor(f"blk.{index}.{theirs}.weight", weight.numpy())


def _interleaved(weight: torch.Tensor) -> torch.Tensor:
    """llama.cpp rotates neighbouring rows of a head, transformers the head's two halves."""
    return weight.view(-1, 2, HEAD_DIM // 2, HIDDEN).transpose(1, 2).reshape(weight.shape).contiguous()
