"""Prompts compressed by the operator that reads their keys, against PyTorch's own way."""

from typing import Any

import pytest
import torch

from longshadow.engine.ops import Operators, operators
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.rope import RotaryLayout
from longshadow.engine.shadowkv.segment import Segment, compress
from tests.engine.shadowkv.batches import Setting

CPU = torch.device("cpu")


def compressed(setting: Setting, keys: torch.Tensor, values: torch.Tensor, chosen: Operators | None) -> Segment:
    return compress(
        keys,
        values,
        setting.rotations(0, 0)(0, keys.shape[1]),
        setting.layout,
        setting.config,
        rank=9,
        key_weights=torch.linspace(0.5, 2, 64).view(2, 32),
        num_sink_chunks=1,
        num_outlier_chunks=2,
        operators=chosen,
    )


@pytest.mark.parametrize(
    ("backend", "shapes"),
    [
        ("reference", {}),
        ("reference", dict(layout=None)),
        ("reference", dict(layout=RotaryLayout(style="interleaved", rotary_dim=20), dtype=torch.float16)),
        ("triton", {}),
    ],
)
def test_segments_are_the_same(backend: str, shapes: dict[str, Any]) -> None:
    """Exact chunks and landmarks, rebuilt keys up to rounding, the energy kept; of keys that are no whole tensor."""
    setting = Setting(config=ShadowKVConfig(chunk_size=4), **shapes)
    keys, values = (setting.random(2, 77, 32) for _ in range(2))
    plain, by_operator = (
        compressed(setting, keys[:, :72], values[:, :72], chosen) for chosen in (None, operators(CPU, backend))
    )
    assert torch.equal(plain.exact_chunks, by_operator.exact_chunks)
    tolerance = 1e-4 if setting.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(by_operator.landmarks.slice(0, 2), plain.landmarks.slice(0, 2), rtol=0, atol=tolerance)
    for actual, expected in zip(by_operator.span(0, 18), plain.span(0, 18), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    assert by_operator.energy_kept == pytest.approx(plain.energy_kept, abs=1e-3)
