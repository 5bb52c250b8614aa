"""Sequences of a batch in several layers, decoded one by one and together, for comparison.

Legend: L layers, B sequences, Hq query heads, H KV heads, D head_dim.
"""

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field
from typing import Any

import torch

from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.decode import StepCounts
from longshadow.engine.shadowkv.decode_batch import DecodeBatch
from longshadow.engine.shadowkv.exact import AttentionParameters
from longshadow.engine.shadowkv.rope import RotaryLayout, Rotation
from longshadow.engine.shadowkv.sequence import RotationTable, Sequence

MAXIMUM_TOKENS = 1200
SMALL = dict(rank=12, budget_tokens=24, num_outlier_chunks=2, local_tokens=8, dense_threshold=40, segment_tokens=64)


@dataclass(eq=False, kw_only=True)
class Setting:
    """Shapes and configuration of a batch, and its random tokens."""

    config: ShadowKVConfig
    num_layers: int = 2
    num_kv_heads: int = 2
    num_groups: int = 2
    key_dim: int = 32
    value_dim: int = 32
    layout: RotaryLayout | None = field(default_factory=lambda: RotaryLayout(style="half", rotary_dim=32))
    softcap: float | None = None
    has_sinks: bool = False
    dtype: torch.dtype = torch.float32
    rotation_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        num_pairs = 1 if self.layout is None else self.layout.rotary_dim // 2
        angles = 30 * torch.rand(MAXIMUM_TOKENS, num_pairs, generator=self._generator)
        self._rotation = Rotation(
            *(table.to(self.device, self.rotation_dtype) for table in (angles.cos(), angles.sin()))
        )
        sinks = self.random(self.num_kv_heads * self.num_groups) if self.has_sinks else None
        self.parameters = AttentionParameters(scaling=self.key_dim**-0.5, softcap=self.softcap, sinks=sinks)

    def random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers on the device, the same on every device."""
        return (scale * torch.randn(shape, generator=self._generator)).to(self.device, self.dtype)

    def rotations(self, layer: int, place: int) -> RotationTable:
        """The same angles for all sequences."""
        return lambda start, stop: None if self.layout is None else self._rotation[slice(start, stop)]

    def sequences(self, prompts: Sequence_[Sequence_[int]]) -> list[list[Sequence]]:
        """[L][B] sequences; each prompt is a list of turns, in tokens."""
        layers: list[list[Sequence]] = []
        counts = StepCounts()
        for layer in range(self.num_layers):
            layers.append([])
            for place, turns in enumerate(prompts):
                sequence = Sequence(
                    config=self.config,
                    layout=self.layout,
                    segment_tokens=self.config.generated_segment_tokens(self.num_kv_heads * self.key_dim),
                    counts=counts,
                )
                for turn in turns:
                    keys = self.random(self.num_kv_heads, turn, self.key_dim)
                    values = self.random(self.num_kv_heads, turn, self.value_dim)
                    sequence.finish_prompt(keys, values, self.rotations(layer, place))
                layers[-1].append(sequence)
        return layers

    def new_tokens(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [B, Hq, D], keys and values [B, H, D] of one token per sequence, in one layer."""
        return (
            self.random(batch_size, self.num_kv_heads * self.num_groups, self.key_dim, scale=3),
            self.random(batch_size, self.num_kv_heads, self.key_dim),
            self.random(batch_size, self.num_kv_heads, self.value_dim),
        )


def copies(layers: list[list[Sequence]], counts: StepCounts) -> list[list[Sequence]]:
    """Independent copies that count for themselves."""
    copied = [[sequence.copy() for sequence in layer] for layer in layers]
    for sequence in (sequence for layer in copied for sequence in layer):
        sequence.counts = counts
    return copied


def decode_alone(setting: Setting, layers: list[list[Sequence]], tokens: list[Any]) -> torch.Tensor:
    """One step of every sequence by itself: [L, B, Hq, D]."""
    return torch.stack(
        [
            torch.stack([_decode_one(setting, sequence, place, *new) for place, sequence in enumerate(layer)])
            for layer, new in zip(layers, tokens, strict=True)
        ]
    )


def _decode_one(
    setting: Setting, sequence: Sequence, place: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    sequence.append(keys[place].unsqueeze(1), values[place].unsqueeze(1), setting.rotations(0, place))
    return sequence.attend_token(query[place], setting.parameters)


def decode_together(
    setting: Setting, batch: DecodeBatch, layers: Sequence_[Sequence_[Sequence | None]], tokens: list[Any]
) -> torch.Tensor:
    """One step of the batch: [L, B, Hq, D]."""
    batch.prepare(layers, setting.rotations)
    return torch.stack([batch.attend(layer, *new, setting.parameters) for layer, new in enumerate(tokens)])
