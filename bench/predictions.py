"""What the cost model says of a measured row: it stands beside the measurement, labelled, and never in its place."""

from __future__ import annotations

from bench.synthetic import ModelShape
from longshadow.engine.planning.calibration import fitted
from longshadow.engine.planning.hardware import GPUS, Hardware
from longshadow.engine.planning.layout import lay_out
from longshadow.engine.planning.memory import sequence_memory
from longshadow.engine.planning.model_shape import ModelShape as PlannedShape
from longshadow.engine.planning.steps import Load, Machine, decode_stages, total_seconds
from longshadow.engine.shadowkv.config import ShadowKVConfig

# A buffer that grows takes an eighth more than it needs.
GROWTH = 1 / 8


def planned_shape(shape: ModelShape, *, element_bytes: int) -> PlannedShape:
    """The shape as the cost model knows it."""
    return PlannedShape(
        name="bench",
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_query_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        rotary_dim=shape.head_dim,
        tied_embeddings=True,
        element_bytes=element_bytes,
    )


def hardware_of(device_name: str) -> Hardware | None:
    """The data sheet of a device by the driver's name for it ("NVIDIA H200"), None for one without."""
    words = device_name.lower().replace("-", " ")
    found = [name for name in GPUS if name.replace("-", " ").removesuffix(" 80gb") in words]
    return GPUS[max(found, key=len)] if found else None


def sequence_device_bytes(shape: PlannedShape, config: ShadowKVConfig, num_tokens: int) -> int:
    """What one sequence takes on the device, room for growth included."""
    memory = sequence_memory(shape, config, lay_out(config, shape.key_width, num_tokens, 1))
    return memory.device_bytes + int(GROWTH * memory.device.get("resident", 0))


def predicted_tokens_per_second(
    shape: PlannedShape,
    config: ShadowKVConfig | None,
    *,
    num_tokens: int,
    batch_size: int,
    hit_rate: float,
    hardware: Hardware,
) -> float:
    """Of all sequences together, at the measured hit rate; `config` None is full attention."""
    load = Load(
        shape=shape,
        config=config,
        batch=batch_size,
        num_prompt_tokens=num_tokens,
        num_new_tokens=1,
        hit_rate=hit_rate,
    )
    return batch_size / total_seconds(decode_stages(load, Machine(hardware=hardware, efficiency=fitted())))
