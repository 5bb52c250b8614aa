"""Time of a decoding step and of a prompt: operators one after another, some at once, each at its slowest ceiling."""

from collections.abc import Mapping
from dataclasses import dataclass

from longshadow.engine.planning import operators, products
from longshadow.engine.planning.hardware import Hardware
from longshadow.engine.planning.implementation import FUSED, PUBLISHED_HIT_RATE, Implementation
from longshadow.engine.planning.layout import lay_out
from longshadow.engine.planning.model_shape import ModelShape
from longshadow.engine.planning.operators import DecodeStep
from longshadow.engine.planning.products import Work
from longshadow.engine.shadowkv.config import ShadowKVConfig


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What is reached of each ceiling; for launches, the quoted time over the real one (above 1: faster)."""

    bandwidth: float = 1
    link: float = 1
    tensor_cores: float = 1
    launch: float = 1


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Seconds of an operator, or of several at once, in all its layers, and the ceiling it meets."""

    name: str
    seconds: float
    ceiling: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device, how near its ceilings one comes, and how operators are implemented."""

    hardware: Hardware
    efficiency: Efficiency
    implementation: Implementation = FUSED

    def ceilings(self, work: Work) -> dict[str, float]:
        """Seconds that each ceiling alone would allow."""
        hardware, efficiency = self.hardware, self.efficiency
        operations = sum(count / hardware.tensor_rate(name) for name, count in work.operations.items())
        return {
            "device memory": work.device_bytes / (hardware.bandwidth * efficiency.bandwidth),
            "host link": work.link_bytes / (hardware.link_bandwidth * efficiency.link),
            "tensor cores": operations / efficiency.tensor_cores,
        }

    def launching(self, num_kernels: int) -> float:
        """Seconds that kernels take whatever they do."""
        replayed = self.implementation.replayed
        each = self.hardware.replay_seconds if replayed else self.hardware.launch_seconds
        return num_kernels * each / self.efficiency.launch

    def seconds(self, work: Work) -> float:
        """The slowest ceiling, and the launches."""
        return max(self.ceilings(work).values()) + self.launching(work.num_kernels)

    def stage(self, name: str, work: Work, repeats: int) -> Stage:
        """`work` in each of `repeats` layers."""
        times = {**self.ceilings(work), "launches": self.launching(work.num_kernels)}
        return Stage(name=name, seconds=repeats * self.seconds(work), ceiling=max(times, key=lambda name: times[name]))


@dataclass(frozen=True, kw_only=True)
class Load:
    """Sequences that decode together.

    Attributes:
        config: None is full attention.
        num_new_tokens: generated so far, by each.
        hit_rate: see `DecodeStep`.
        offloaded: a full cache in host memory, moved over the link in every step.
    """

    shape: ModelShape
    config: ShadowKVConfig | None
    batch: int
    num_prompt_tokens: int
    num_new_tokens: int
    hit_rate: float = PUBLISHED_HIT_RATE
    offloaded: bool = False

    @property
    def num_tokens(self) -> int:
        """Of each sequence."""
        return self.num_prompt_tokens + self.num_new_tokens


def attention_operators(load: Load, implementation: Implementation) -> dict[str, Work]:
    """Of one full-attention layer, from the query to attention's output."""
    shape, config = load.shape, load.config
    full = {"full_attention": products.full_attention(shape, load.batch, load.num_tokens, offloaded=load.offloaded)}
    if config is None:
        return full
    size = lay_out(config, shape.key_width, load.num_prompt_tokens, load.num_new_tokens)
    if not size.num_selected_chunks:
        return full
    step = DecodeStep(
        shape=shape,
        config=config,
        size=size,
        batch=load.batch,
        hit_rate=load.hit_rate,
        implementation=implementation,
    )
    group_max = {"group_max": operators.group_max(step)} if implementation.separate_group_max else {}
    return {
        "score_chunks": operators.score_chunks(step),
        **group_max,
        "top_chunks": operators.top_chunks(step),
        "plan_chunks": operators.plan_chunks(step),
        "rebuild_keys": operators.rebuild_keys(step),
        "choose_tokens": operators.choose_tokens(step),
        "fetch_values": operators.fetch_values(step),
        "sparse_attention": operators.sparse_attention(step),
    }


def layer_operators(load: Load, implementation: Implementation) -> dict[str, Work]:
    """Of one full-attention layer, in order."""
    shape, batch = load.shape, load.batch
    return {
        "qkv": products.qkv(shape, batch, implementation),
        **attention_operators(load, implementation),
        "output_projection": products.output_projection(shape, batch),
        "ffn": products.ffn(shape, batch, implementation),
        "others": Work(num_kernels=implementation.other_kernels),
    }


def decode_stages(load: Load, machine: Machine) -> list[Stage]:
    """One step of all layers and the head.

    Values of whole chunks are fetched while keys are rebuilt; where logits choose among more tokens than are
    attended, their values are not known before.
    """
    shape, works = load.shape, layer_operators(load, machine.implementation)
    if load.config is not None and load.config.candidate_factor == 1 and "fetch_values" in works:
        works = _at_once(works, "rebuild_keys", "fetch_values")
    sliding = {name: work for name, work in works.items() if name in ("qkv", "output_projection", "ffn", "others")}
    window = min(load.num_tokens, shape.sliding_window)
    sliding["sliding_attention"] = products.full_attention(shape, load.batch, window)
    layers: list[tuple[Mapping[str, Work], int]] = [(works, shape.num_full_layers), (sliding, shape.num_sliding_layers)]
    stages = [
        machine.stage(name, work, repeats) for works, repeats in layers for name, work in works.items() if repeats
    ]
    return [*stages, machine.stage("head", products.head(shape, load.batch, machine.implementation), 1)]


def _at_once(works: dict[str, Work], first: str, second: str) -> dict[str, Work]:
    joined = f"{first} + {second}"
    return {
        joined if name == first else name: works[first] + works[second] if name == first else work
        for name, work in works.items()
        if name != second
    }


def prefill_stages(
    shape: ModelShape,
    config: ShadowKVConfig | None,
    num_tokens: int,
    machine: Machine,
    *,
    prefill_chunk_size: int | None = None,
) -> list[Stage]:
    """One prompt of one sequence, to its first token.

    ShadowKV summarises keys and stores values after each layer's attention. In chunks, it parks exact keys and values
    in the value store, and every chunk reads what was parked before it.
    """
    layers, full = shape.num_layers, shape.num_full_layers
    stages = [
        machine.stage("projections", prefill_products(shape, num_tokens, machine.implementation), layers),
        machine.stage("attention", prefill_attention(shape, num_tokens), full),
        machine.stage("head", products.head(shape, 1, machine.implementation), 1),
    ]
    if shape.num_sliding_layers:
        window = Work(operations={"bf16": 4 * shape.query_width * num_tokens * min(num_tokens, shape.sliding_window)})
        stages.append(machine.stage("sliding attention", window, shape.num_sliding_layers))
    if config is None or config.runs_dense(num_tokens):
        return stages
    stages += [
        machine.stage("summarize_keys", operators.summarize_keys(shape, config, num_tokens), full),
        machine.stage("store_values", operators.store_values(shape, config, num_tokens), full),
    ]
    if prefill_chunk_size is not None and prefill_chunk_size < num_tokens:
        parked = parked_history(shape, config, num_tokens, prefill_chunk_size)
        stages.append(machine.stage("parked keys and values", parked, full))
    return stages


def prefill_products(shape: ModelShape, num_tokens: int, implementation: Implementation) -> Work:
    """A layer's matrix products over all tokens of a prompt."""
    return (
        products.qkv(shape, num_tokens, implementation)
        + products.output_projection(shape, num_tokens)
        + products.ffn(shape, num_tokens, implementation)
        + Work(num_kernels=implementation.other_kernels)
    )


def prefill_attention(shape: ModelShape, num_tokens: int) -> Work:
    """Causal attention of a prompt in one layer: half of 4 n^2 query_width operations."""
    num_bytes = 2 * num_tokens * (shape.query_width + shape.key_width) * shape.element_bytes
    return Work(device_bytes=num_bytes, operations={"bf16": 2 * num_tokens**2 * shape.query_width}, num_kernels=1)


def parked_history(shape: ModelShape, config: ShadowKVConfig, num_tokens: int, chunk: int) -> Work:
    """Exact keys and values of one layer, written once, and read by every later chunk and at the end."""
    token = 2 * shape.key_width * shape.element_bytes
    before = range(0, num_tokens, chunk)
    num_bytes = (sum(before) + 2 * before[-1]) * token
    on_host = config.value_store == "host"
    return Work(device_bytes=num_bytes, link_bytes=num_bytes if on_host else 0, num_kernels=len(before))


def total_seconds(stages: list[Stage]) -> float:
    """Of all stages, one after another."""
    return sum(stage.seconds for stage in stages)
