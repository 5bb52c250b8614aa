"""Models, keys and values of a chosen shape: caches are filled with them without weights and without a prefill.

Legend: H KV heads, n tokens, D head_dim, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.rope import RotaryLayout, Rotation, rotate
from longshadow.engine.shadowkv.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a Llama model."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float

    @property
    def key_width(self) -> int:
        """Elements of a token's keys, all heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def layout(self) -> RotaryLayout:
        """Rotation of the whole head, by halves."""
        return RotaryLayout(style="half", rotary_dim=self.head_dim)

    def rotation(self, num_tokens: int, device: str) -> Rotation:
        """Plain RoPE of positions 0 .. num_tokens."""
        exponents = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        positions = torch.arange(num_tokens, device=device, dtype=torch.float32)
        angles = positions.unsqueeze(1) * self.rope_theta**-exponents
        return Rotation(angles.cos(), angles.sin())

    def model(self, *, dtype: torch.dtype, device: str, seed: int, max_positions: int) -> LlamaForCausalLM:
        """A Llama model of this shape with random weights, in evaluation mode."""
        torch.manual_seed(seed)
        config = LlamaConfig(
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_query_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            max_position_embeddings=max_positions,
            tie_word_embeddings=True,
            dtype=dtype,
        )
        model = LlamaForCausalLM(config)
        nn.Module.to(model, device=device, dtype=dtype)
        nn.Module.eval(model)
        return model


LLAMA_3_1_8B = ModelShape(
    num_layers=32,
    num_query_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=14_336,
    vocab_size=128_256,
    rope_theta=500_000.0,
)
SMOLLM2_135M = ModelShape(
    num_layers=30,
    num_query_heads=9,
    num_kv_heads=3,
    head_dim=64,
    hidden_size=576,
    intermediate_size=1536,
    vocab_size=49_152,
    rope_theta=100_000.0,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class SyntheticTokens:
    """Post-RoPE keys [H, n, D], whose pre-RoPE form has exactly the wanted rank, values alike, and the rotation."""

    keys: torch.Tensor
    values: torch.Tensor
    rotation: Rotation

    def cache(self, shape: ModelShape, config: ShadowKVConfig) -> Sequence:
        """A compressed sequence of these tokens."""
        sequence = Sequence(
            config=config,
            layout=shape.layout,
            segment_tokens=config.generated_segment_tokens(shape.key_width),
        )
        sequence.finish_prompt(self.keys, self.values, lambda start, stop: self.rotation[start:stop])
        return sequence


def make_tokens(
    shape: ModelShape, num_tokens: int, *, rank: int, dtype: torch.dtype, device: str, seed: int
) -> SyntheticTokens:
    """Random tokens; keys of unit variance."""
    generator = torch.Generator(device).manual_seed(seed)
    coefficients = torch.randn(num_tokens, rank, generator=generator, device=device)
    basis = torch.randn(rank, shape.key_width, generator=generator, device=device) * rank**-0.5
    rotation = shape.rotation(num_tokens, device)
    keys = torch.empty(shape.num_kv_heads, num_tokens, shape.head_dim, dtype=dtype, device=device)
    for head, columns in enumerate(basis.split(shape.head_dim, dim=1)):
        keys[head] = rotate(coefficients @ columns, rotation, shape.layout)
    values = torch.randn(keys.shape, generator=generator, device=device, dtype=dtype)
    return SyntheticTokens(keys=keys, values=values, rotation=rotation)


def make_cache(
    shape: ModelShape, num_tokens: int, *, rank: int, dtype: torch.dtype, device: str, seed: int
) -> DynamicCache:
    """An exact cache of random tokens for a model of this shape."""
    cache = DynamicCache()
    for layer in range(shape.num_layers):
        tokens = make_tokens(shape, num_tokens, rank=rank, dtype=dtype, device=device, seed=seed + layer)
        cache.update(tokens.keys.unsqueeze(0), tokens.values.unsqueeze(0), layer)
    return cache


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Within, torch computes on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
