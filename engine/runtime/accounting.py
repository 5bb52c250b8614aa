"""The exact bytes a sequence takes in all layers, before it exists: what `memory()` reports when it does."""

from collections import Counter
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

import torch

from longshadow.engine.runtime.layer_plan import LayerPlan, WindowPlan
from longshadow.engine.runtime.memory import Bytes
from longshadow.engine.runtime.segment_sizes import FP32_BYTES, SegmentSizes
from longshadow.engine.runtime.shapes import LayerShape, Start
from longshadow.engine.runtime.state import BLOCK_TOKENS
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.step_buffers import Capacity


@dataclass(frozen=True, kw_only=True)
class Need:
    """The most a request holds.

    Attributes:
        prefill: until its prompt has been read, workspace included; never less than afterwards.
        shared: afterwards, what its completions share.
        completion: afterwards, what each completion has of its own.
        room: what a place of a batch must have room for while a completion decodes there.
    """

    prefill: Bytes
    shared: Bytes
    completion: Bytes
    room: Capacity = field(default_factory=Capacity)


class Accounting:
    """Bytes of sequences of one model under one configuration."""

    def __init__(
        self, layers: Sequence_[LayerShape], config: ShadowKVConfig, device: torch.device, *, is_batched: bool = False
    ) -> None:
        """`is_batched`: sequences decode in a batch, whose memory is not counted with theirs."""
        self.layers = layers
        self.config = config
        full = [layer for layer in layers if layer.window is None]
        self.sizes = SegmentSizes(
            config=config, segment_tokens=config.generated_segment_tokens(max(layer.key_width for layer in full))
        )
        self._device = device
        self._is_batched = is_batched
        self._kinds = Counter(layers)

    def plan(self, layer: LayerShape, start: Start, total_tokens: int) -> LayerPlan | WindowPlan:
        """A sequence in this layer that goes on from `start` and gets `total_tokens` at most."""
        if layer.window is not None:
            return WindowPlan(layer=layer, capacity=min(layer.window, total_tokens))
        plan = LayerPlan(layer=layer, sizes=self.sizes, device=self._device, is_batched=self._is_batched)
        plan.restore(start, shared=True)
        return plan

    def need(self, num_prompt: int, num_new: int, *, start: Start | None = None, num_completions: int = 1) -> Need:
        """Of a request that reads `num_prompt` tokens after `start` and then caches up to `num_new` tokens."""
        start = start or Start()
        total_tokens = start.num_tokens + num_prompt + num_new
        prefill, shared, completion = self._workspace(num_prompt + start.tail), Bytes(), Bytes()
        if not start.num_tokens:  # the sums at the ends of blocks, which a later prompt may go on from
            prefill += Bytes(device=num_prompt // BLOCK_TOKENS * self.energy_bytes)
        room = Capacity()
        for layer, count in self._kinds.items():
            plan = self.plan(layer, start, total_tokens)
            before = plan.held
            plan.finish_prompt(num_prompt)
            # While one layer is compressed, earlier ones have been, and parked tokens may be kept for other prompts.
            parked = self.sizes.stored(num_prompt * layer.token_bytes)
            prefill += (parked + before.at_least(plan.held)) * count
            prompt = plan.segment_bytes
            plan.generate(num_new)
            shared += prompt * count
            completion += (plan.largest - prompt) * count
            if isinstance(plan, LayerPlan):
                room = plan.room
        afterwards = shared + completion * num_completions
        return Need(prefill=prefill.at_least(afterwards), shared=shared, completion=completion, room=room)

    def document(self, start: Start) -> Bytes:
        """Of a document that consists of these segments and this tail."""
        total = Bytes()
        for layer, count in self._kinds.items():
            plan = self.plan(layer, Start(), start.num_tokens)
            plan.restore(start, shared=False)
            total += plan.held * count
        return total

    @property
    def token_bytes(self) -> int:
        """Exact keys and values of a token in all layers."""
        return sum(layer.token_bytes for layer in self.layers)

    @property
    def energy_bytes(self) -> int:
        """Query energy of all layers."""
        if not self.config.query_weighted:
            return 0
        return sum(layer.key_width * FP32_BYTES for layer in self.layers if layer.window is None)

    def _workspace(self, num_tokens: int) -> Bytes:
        """An upper bound on what compressing so many tokens of one layer needs beside what it leaves."""
        most = Bytes()
        for layer in self._kinds:
            if layer.window is None:
                most = most.at_least(self.sizes.workspace(layer, num_tokens))
        return most
