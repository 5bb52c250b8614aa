from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longshadow import ShadowKVConfig
from longshadow.engine.ops import operators
from longshadow.engine.runtime.accounting import Accounting
from longshadow.engine.runtime.layer_plan import LayerPlan
from longshadow.engine.runtime.memory import Bytes
from longshadow.engine.runtime.shapes import LayerShape, Start
from longshadow.engine.runtime.state import BlockedEnergy, SequenceState
from longshadow.engine.shadowkv.batch_memory import batch_bytes
from longshadow.engine.shadowkv.decode import StepCounts
from longshadow.engine.shadowkv.decode_batch import DecodeBatch
from longshadow.engine.shadowkv.exact import AttentionParameters
from longshadow.engine.shadowkv.rope import RotaryLayout, Rotation
from longshadow.engine.shadowkv.sequence import Sequence
from longshadow.engine.shadowkv.step_buffers import Geometry

HEADS, KEY_DIM, VALUE_DIM = 2, 8, 4
SHAPE = LayerShape(num_kv_heads=HEADS, key_dim=KEY_DIM, value_dim=VALUE_DIM, itemsize=4)
CPU = torch.device("cpu")
LAYOUT = RotaryLayout(style="half", rotary_dim=KEY_DIM)

configs = st.builds(
    ShadowKVConfig,
    budget_tokens=st.integers(1, 64),
    rank=st.integers(1, 16),
    chunk_size=st.sampled_from((1, 4, 8)),
    num_sink_chunks=st.integers(0, 2),
    num_outlier_chunks=st.integers(0, 5),
    local_tokens=st.integers(1, 40),
    segment_tokens=st.sampled_from((64, 96)),
    dense_threshold=st.sampled_from((None, 0, 50, 200)),
    key_store=st.sampled_from(("low_rank", "exact")),
    value_store=st.sampled_from(("host", "device")),
    value_dtype=st.sampled_from((None, "int8")),
    factor_dtype=st.sampled_from((None, "int8", "fp8")),
    query_weighted=st.booleans(),
    resident_factor=st.sampled_from((None, 1.0, 1.5)),
    candidate_factor=st.sampled_from((1.0, 3.0)),
)

# Its tail is compressed to nothing before a token comes.
TO_NOTHING = ShadowKVConfig(budget_tokens=1, rank=1, chunk_size=1, local_tokens=1, segment_tokens=64, dense_threshold=0)


def plan_of(accounting: Accounting, start: Start | None = None) -> LayerPlan:
    plan = accounting.plan(SHAPE, start or Start(), 10**6)
    assert isinstance(plan, LayerPlan)
    return plan


class Grown:
    """A real sequence and the plan of one, which take the same steps; with a `batch`, in it."""

    def __init__(self, config: ShadowKVConfig, batch: DecodeBatch | None = None) -> None:
        self.config, self.batch = config, batch
        self.accounting = Accounting([SHAPE], config, CPU, is_batched=batch is not None)
        self.sequence = Sequence(config=config, layout=LAYOUT, segment_tokens=self.accounting.sizes.segment_tokens)
        self.generator = torch.Generator().manual_seed(0)
        self.plan = plan_of(self.accounting)

    def tokens(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.randn(HEADS, count, KEY_DIM, generator=self.generator),
            torch.randn(HEADS, count, VALUE_DIM, generator=self.generator),
        )

    @staticmethod
    def rotations(start: int, stop: int) -> Rotation:
        angles = torch.arange(start, stop).unsqueeze(1) * torch.tensor([1.0, 0.3, 0.1, 0.03])
        return Rotation(angles.cos(), angles.sin())

    def read(self, count: int) -> None:
        if self.config.query_weighted:
            self.sequence.query_energy.add(torch.randn(2 * HEADS, count, KEY_DIM, generator=self.generator), HEADS)
        self.sequence.finish_prompt(*self.tokens(count), self.rotations)
        self.plan.finish_prompt(count)

    def decode(self, count: int) -> Bytes:
        """The most the sequence holds meanwhile."""
        most = self.held()
        for step in range(count):
            if self.batch is not None:
                self._decode_batched(self.batch, attends=(count - step) % 10 == 1)
                most = most.at_least(self.held())
                continue
            self.sequence.append(*self.tokens(1), self.rotations)
            if (count - step) % 10 == 1:
                query = torch.randn(2 * HEADS, KEY_DIM, generator=self.generator)
                self.sequence.attend_token(query, AttentionParameters(scaling=0.3))
            most = most.at_least(self.held())
        self.plan.generate(count)
        return most

    def _decode_batched(self, batch: DecodeBatch, *, attends: bool) -> None:
        batch.prepare([[self.sequence]], lambda layer, place: self.rotations)
        keys, values = self.tokens(1)
        if attends:
            query = torch.randn(1, 2 * HEADS, KEY_DIM, generator=self.generator)
            batch.attend(0, query, keys.transpose(0, 1), values.transpose(0, 1), AttentionParameters(scaling=0.3))
        else:
            self.sequence.tail.keys[:, -1:], self.sequence.tail.values[:, -1:] = keys, values

    def held(self) -> Bytes:
        state = SequenceState(layers=[self.sequence], num_tokens=self.sequence.num_tokens)
        report = state.memory(values_on_host=self.config.value_store == "host")
        return Bytes(device=report.device_bytes, host=report.host_bytes)


@given(config=configs, num_prompt=st.integers(1, 400), num_new=st.integers(1, 200))
@settings(max_examples=25, deadline=None)
def test_predicts_every_byte(config: ShadowKVConfig, num_prompt: int, num_new: int) -> None:
    grown = Grown(config)
    grown.read(num_prompt)
    most = grown.decode(num_new)
    assert grown.plan.held == grown.held()
    # The tail that is about to be compressed is counted, too.
    tail = (num_prompt + num_new) * 2 * SHAPE.token_bytes
    assert most.device <= grown.plan.largest.device <= most.device + tail
    assert grown.plan.largest.host == most.host


@given(
    config=configs.filter(lambda config: config.key_store == "low_rank"),
    num_prompt=st.integers(1, 400),
    num_new=st.integers(1, 200),
)
@example(config=TO_NOTHING, num_prompt=1, num_new=3)
@settings(max_examples=15, deadline=None)
def test_predicts_every_byte_of_a_batch(config: ShadowKVConfig, num_prompt: int, num_new: int) -> None:
    """Of the sequence, and of the memory that it decodes in, which never has to grow."""
    batch = DecodeBatch(operators(CPU, "reference"), config, CPU)
    grown = Grown(config, batch)
    room = grown.accounting.need(num_prompt, num_new).room
    batch.hold(1, room)
    grown.read(num_prompt)
    most = grown.decode(num_new)
    assert grown.plan.held == grown.held() and grown.plan.room == room
    tail = (num_prompt + num_new) * 2 * SHAPE.token_bytes
    assert most.device <= grown.plan.largest.device <= most.device + tail
    assert grown.plan.largest.host == most.host
    geometry = Geometry(
        num_kv_heads=HEADS,
        key_dim=KEY_DIM,
        value_dim=VALUE_DIM,
        chunk_size=config.chunk_size,
        layout=LAYOUT,
        dtype=torch.float32,
        device=CPU,
    )
    batch.add_hits_to(StepCounts())
    held = sum(tensor.nbytes for tensors in batch.tensors().values() for tensor in tensors)
    assert held == batch_bytes(config, (geometry,), 2 * HEADS, room, 1)


@given(config=configs, num_prompt=st.integers(1, 300), num_turn=st.integers(1, 700))
@settings(max_examples=25, deadline=None)
def test_a_later_turn_and_a_restored_document(config: ShadowKVConfig, num_prompt: int, num_turn: int) -> None:
    grown = Grown(config)
    grown.read(num_prompt)
    grown.read(num_turn)
    start = SequenceState(layers=[grown.sequence]).start
    resident = grown.plan.resident_bytes
    assert grown.accounting.document(start) - Bytes(device=resident) == grown.held()
    copy = SequenceState(layers=[grown.sequence]).fork(10**6)
    plan = plan_of(grown.accounting, start)
    own = sum(tensor.nbytes for tensor in [*copy.layers[0].tail.tensors, *copy.layers[0].query_energy.tensors])  # type: ignore[union-attr]
    assert plan.held - Bytes(device=resident) == Bytes(device=own)


def test_the_need_of_a_request_bounds_all_it_holds_and_counts_shared_segments_once() -> None:
    config = ShadowKVConfig(
        budget_tokens=32, rank=8, dense_threshold=0, local_tokens=16, segment_tokens=64, num_outlier_chunks=2
    )
    accounting = Accounting([SHAPE] * 3, config, CPU)
    one = accounting.need(300, 100)
    four = accounting.need(300, 100, num_completions=4)
    assert four.shared == one.shared and four.completion == one.completion
    total = four.shared + four.completion * 4
    assert four.prefill.device >= total.device and four.prefill.host >= total.host
    assert one.shared.host == 3 * 280 * HEADS * VALUE_DIM * 4


def test_a_window_takes_its_window_or_all_tokens() -> None:
    shape = LayerShape(num_kv_heads=2, key_dim=8, value_dim=8, itemsize=2, window=100)
    accounting = Accounting([SHAPE, shape], ShadowKVConfig(), CPU)
    without = Accounting([SHAPE], ShadowKVConfig(), CPU)
    for num_tokens, held in ((30, 40), (300, 100)):
        extra = accounting.need(num_tokens, 10).completion - without.need(num_tokens, 10).completion
        assert extra == Bytes(device=held * shape.token_bytes)


@pytest.mark.parametrize("num_tokens", [10**3, 10**7])
def test_long_requests_are_counted_quickly(num_tokens: int) -> None:
    accounting = Accounting([SHAPE], ShadowKVConfig(segment_tokens=4096, local_tokens=2000), CPU)
    assert accounting.need(num_tokens, num_tokens).shared.host >= 0


def test_sums_of_query_energies_are_reserved_while_a_prompt_is_read() -> None:
    config = ShadowKVConfig(budget_tokens=32, rank=8, query_weighted=True)
    accounting = Accounting([SHAPE] * 3, config, CPU)
    energies = [BlockedEnergy() for _ in range(3)]
    for energy in energies:
        energy.add(torch.randn(2 * HEADS, 700, KEY_DIM), HEADS)
    held = sum(tensor.nbytes for energy in energies for tensor in energy.sums)
    need, unweighted = (
        Accounting([SHAPE] * 3, replace(config, query_weighted=weighted), CPU).need(700, 0)
        for weighted in (True, False)
    )
    assert need.prefill.device - unweighted.prefill.device >= held == 10 * accounting.energy_bytes
