"""The cost model beside measured rows."""

import pytest

from bench.predictions import hardware_of, planned_shape, predicted_tokens_per_second, sequence_device_bytes
from bench.synthetic import LLAMA_3_1_8B
from longshadow.engine.planning.hardware import A100, H200, RTX_4090
from longshadow.engine.planning.reading import SHAPES
from longshadow.engine.shadowkv.config import ShadowKVConfig


@pytest.mark.parametrize(
    ("name", "hardware"),
    [
        ("NVIDIA H200", H200),
        ("NVIDIA A100-SXM4-80GB", A100),
        ("NVIDIA GeForce RTX 4090", RTX_4090),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_devices_by_the_drivers_name(name, hardware):
    assert hardware_of(name) == hardware


def test_the_shape_is_the_cost_models_own():
    planned, named = planned_shape(LLAMA_3_1_8B, element_bytes=2), SHAPES["llama-3.1-8b"]
    for field in ("num_layers", "key_width", "query_width", "layer_weights", "head_dim"):
        assert getattr(planned, field) == getattr(named, field)


def test_predictions_follow_the_hit_rate():
    shape = planned_shape(LLAMA_3_1_8B, element_bytes=2)

    def speed(hit_rate):
        return predicted_tokens_per_second(
            shape, ShadowKVConfig(), num_tokens=122 * 1024, batch_size=8, hit_rate=hit_rate, hardware=H200
        )

    assert 0 < speed(0.3) < speed(0.9)


def test_bytes_of_a_sequence_are_less_where_values_are_elsewhere():
    shape = planned_shape(LLAMA_3_1_8B, element_bytes=2)
    host, device = (
        sequence_device_bytes(shape, ShadowKVConfig(value_store=store, resident_factor=1.0), 122 * 1024)
        for store in ("host", "device")
    )
    assert device - host >= 32 * 8 * 122_000 * 256
