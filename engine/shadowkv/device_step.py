"""One decoding step of one layer for a whole batch, by operators: what `decode.attend_sparsely` does per sequence.

Legend: B places of the batch, H KV heads, G query heads per KV head, S slots, T selected tokens, c chunk size,
D head_dim of keys, V of values.
"""

from dataclasses import dataclass

import torch

from longshadow.engine.ops import Operators, SegmentTable
from longshadow.engine.ops.rotary import RotaryStyle
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.exact import AttentionParameters
from longshadow.engine.shadowkv.resident import EMPTY
from longshadow.engine.shadowkv.rope import RotaryLayout
from longshadow.engine.shadowkv.step_buffers import ResidentSlots, StepScratch
from longshadow.engine.shadowkv.step_tables import StepTables


@dataclass(frozen=True, eq=False, kw_only=True)
class StepMemory:
    """What a step of one layer reads and writes beside queries, keys and values."""

    tables: StepTables
    table: SegmentTable
    slots: ResidentSlots
    scratch: StepScratch
    layout: RotaryLayout | None


class DeviceStep:
    """Launches a step's operators. It waits for nothing, and what it launches depends on no number on the device."""

    def __init__(self, operators: Operators, config: ShadowKVConfig, device: torch.device) -> None:
        self._operators = operators
        self._chunk_size = config.chunk_size
        self._takes_all_tokens = config.candidate_factor == 1
        self._keeps_chunks = config.num_resident_chunks(1, device) > 0
        self._fetching = torch.cuda.Stream(device) if device.type == "cuda" else None

    def attend(
        self,
        query_BHGD: torch.Tensor,
        keys_BHD: torch.Tensor,
        values_BHV: torch.Tensor,
        parameters: AttentionParameters,
        memory: StepMemory,
        *,
        selects: bool,
    ) -> torch.Tensor:
        """Appends each sequence's new token to its tail, then attends to its history: [B, H, G, V].

        Without `selects` no sequence has candidates, and exact tokens are all there is to attend to.
        """
        slots, scratch, regions = memory.slots, memory.scratch, memory.table.regions
        sinks = None if parameters.sinks is None else parameters.sinks.view(query_BHGD.shape[1:3])
        scaling, softcap = parameters.scaling, parameters.softcap or 0.0
        self._operators.append_tokens(keys_BHD, values_BHV, memory.tables.tail_tokens, regions)
        places = scratch.no_places
        if selects:
            self._propose_chunks(query_BHGD, scaling, softcap, memory)
            if self._takes_all_tokens:
                places = self._take_all_tokens(memory)
            else:
                places = self._take_best_tokens(query_BHGD, sinks, scaling, softcap, memory)
        out = query_BHGD.new_empty(*query_BHGD.shape[:3], values_BHV.shape[2])
        self._operators.sparse_attention(
            query_BHGD,
            places,
            slots.keys,
            slots.values,
            regions,
            sinks,
            scaling,
            softcap,
            out,
            scratch.lse,
            scratch.attention_workspace,
        )
        return out

    def _propose_chunks(self, query_BHGD: torch.Tensor, scaling: float, softcap: float, memory: StepMemory) -> None:
        """Finds the chunks with the best landmarks and gives each a slot."""
        tables, table, slots, scratch = memory.tables, memory.table, memory.slots, memory.scratch
        self._operators.score_chunks(
            query_BHGD,
            table.segments,
            scaling,
            softcap,
            table.factors,
            scratch.chunk_scores,
            scratch.score_workspace,
        )
        self._operators.top_chunks(scratch.chunk_scores, tables.num_candidates, scratch.candidates)
        if not self._keeps_chunks:
            slots.chunks.fill_(EMPTY)
        self._operators.plan_chunks(
            scratch.candidates,
            slots.chunks,
            slots.last_used,
            slots.has_values,
            tables.step,
            scratch.slots,
            scratch.misses,
            slots.num_misses,
        )

    def _take_all_tokens(self, memory: StepMemory) -> torch.Tensor:
        """Places of all the candidates' tokens, [B, H, T]; values come over the link while keys are rebuilt."""
        scratch = memory.scratch
        places = scratch.places.unflatten(2, (-1, self._chunk_size))
        # A candidate without a slot, -1, has places below 0, which are none.
        torch.add(scratch.offsets, scratch.slots.unsqueeze(3), alpha=self._chunk_size, out=places)
        if self._fetching is None:
            self._rebuild_keys(memory)
            self._fetch_values(memory)
            return scratch.places
        current = torch.cuda.current_stream(scratch.places.device)
        self._fetching.wait_stream(current)
        with torch.cuda.stream(self._fetching):
            self._fetch_values(memory)
        self._rebuild_keys(memory)
        current.wait_stream(self._fetching)
        return scratch.places

    def _take_best_tokens(
        self,
        query_BHGD: torch.Tensor,
        sinks: torch.Tensor | None,
        scaling: float,
        softcap: float,
        memory: StepMemory,
    ) -> torch.Tensor:
        """Places of the candidates' tokens with the largest attention weights, [B, H, T]; only their values come."""
        tables, slots, scratch = memory.tables, memory.slots, memory.scratch
        self._rebuild_keys(memory)
        # In the order of slots, not of candidates, so that the index of a score is its token's place.
        current_slots = torch.where(slots.last_used == tables.step, scratch.slot_numbers, EMPTY)
        self._operators.score_tokens(
            query_BHGD,
            current_slots,
            slots.keys,
            memory.table.regions,
            sinks,
            scaling,
            softcap,
            scratch.token_scores,
            scratch.token_workspace,
        )
        self._operators.top_chunks(scratch.token_scores, tables.num_tokens, scratch.places)
        self._fetch_values(memory)
        return scratch.places

    def _rebuild_keys(self, memory: StepMemory) -> None:
        table, slots, scratch = memory.table, memory.slots, memory.scratch
        self._operators.rebuild_keys(
            table.segments,
            scratch.candidates,
            scratch.slots,
            scratch.misses,
            slots.num_misses,
            table.factors,
            RotaryStyle.of(memory.layout),
            0 if memory.layout is None else memory.layout.rotary_dim,
            slots.keys,
            table.rotation_fp32,
        )

    def _fetch_values(self, memory: StepMemory) -> None:
        table, slots = memory.table, memory.slots
        self._operators.fetch_values(
            table.segments, slots.chunks, memory.scratch.places, table.values, slots.has_values, slots.values
        )
