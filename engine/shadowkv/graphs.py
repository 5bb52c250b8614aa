"""Decoding under CUDA graphs: a model's one-token forward, captured once and replayed at every step.

Launching a step's kernels one by one takes a CPU longer than a small batch takes a GPU. All that a step needs of the
host is done before: lengths, compression, tables (`DecodeBatch.prepare`). What remains is a fixed series of launches.

Legend: B sequences.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from longshadow.engine.shadowkv.cache import ShadowKVCache
from longshadow.engine.shadowkv.choice import why_not_ahead
from longshadow.engine.shadowkv.layer import ShadowKVLayer

logger = logging.get_logger(__name__)

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class GraphedForward:
    """A forward from ids and positions [B, 1] to logits whose launches depend on nothing but a signature.

    The first run with a signature is an ordinary one, which compiles and allocates; on a CUDA device its launches are
    then captured, for the runs to come. Elsewhere, and where capturing fails, every run is an ordinary one.

    Attributes:
        failure: why capturing failed.
    """

    def __init__(self, forward: Forward, device: torch.device) -> None:
        self._forward = forward
        self._captures = device.type == "cuda"
        self.failure: RuntimeError | None = None
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._ids = torch.empty(0, 1, dtype=torch.long, device=device)
        self._positions = torch.empty_like(self._ids)
        self.clear()

    def clear(self) -> None:
        """Forgets all graphs; their memory is free then."""
        self._graphs.clear()
        # A pool without graphs cannot be shared any more while a result out of it is still held.
        self._pool: Any = torch.cuda.graph_pool_handle() if self._captures else None

    @property
    def num_graphs(self) -> int:
        """Graphs that are held now."""
        return len(self._graphs)

    def run(self, ids: torch.Tensor, positions: torch.Tensor, signature: tuple[int, bool]) -> torch.Tensor:
        """The logits; the next run overwrites them. `signature`: of `DecodeBatch`, after `prepare`."""
        if self._ids.shape != ids.shape:
            self.clear()
            self._ids, self._positions = torch.empty_like(ids), torch.empty_like(ids)
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        if signature in self._graphs:
            graph, logits = self._graphs[signature]
            graph.replay()
            return logits
        logits = self._forward(self._ids, self._positions)
        if self._captures:
            self._capture(signature)
        return logits

    def _capture(self, signature: tuple[int, bool]) -> None:
        # Memory of an older version is gone, and will not come back.
        if any(held[0] != signature[0] for held in self._graphs):
            self.clear()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = self._forward(self._ids, self._positions)
        except RuntimeError as error:
            self._captures, self.failure = False, error
            logger.warning_once(
                f"decoding goes on without CUDA graphs, the model's forward cannot be captured: {error}"
            )
            return
        self._graphs[signature] = graph, logits


class DecodeGraphs:
    """Steps of `model` over `cache`, one token of every sequence each.

    Where a step cannot be prepared ahead of its launches it is an ordinary forward, with the same result.
    """

    def __init__(self, model: PreTrainedModel, cache: ShadowKVCache) -> None:
        self._model_forward = model.forward
        self._cache = cache
        self._graphed = GraphedForward(self._forward, model.device)
        reason = why_not(model, cache)
        self._runs_ahead = reason is None
        if reason is not None and cache.state.batch is not None:
            logger.warning_once(f"decoding runs without CUDA graphs: {reason}")

    @property
    def num_graphs(self) -> int:
        """Graphs that are held now."""
        return self._graphed.num_graphs

    @property
    def failure(self) -> RuntimeError | None:
        """Why capturing failed, if it did."""
        return self._graphed.failure

    def step(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, 1, vocabulary] after one more token [B, 1] of each sequence; the next step overwrites them.

        position_ids [B or 1, 1]: default, how many tokens a sequence has. attention_mask [B, tokens]: default, that
        of the earlier tokens, and the new ones are real. Raises ValueError for one that says something else of them.
        """
        state = self._cache.state
        if attention_mask is None:
            attention_mask = state.positions.mask_with(1)
        elif state.positions.new_tokens(attention_mask, len(input_ids), 1) is not None:
            raise ValueError("attention_mask hides a new token, but a step gives every sequence one")
        if position_ids is None:
            position_ids = torch.tensor(state.positions.num_real).unsqueeze(1)
            position_ids = position_ids.to(input_ids.device, non_blocking=True)
        position_ids = position_ids.expand_as(input_ids)
        if not self._runs_ahead or not state.begin_ahead(position_ids):
            return self._forward(input_ids, position_ids, attention_mask)
        assert state.batch is not None
        self._cache.tokens.append(input_ids)
        try:
            return self._graphed.run(input_ids, position_ids, state.batch.signature)
        finally:
            state.end_ahead()

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        with torch.no_grad():
            output: Any = self._model_forward(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=self._cache,
                use_cache=True,
            )
        logits: torch.Tensor = output.logits
        return logits


def why_not(model: PreTrainedModel, cache: ShadowKVCache) -> str | None:
    """Why steps of `model` cannot be prepared ahead of their launches; None where they can."""
    has_windows = not all(isinstance(layer, ShadowKVLayer) for layer in cache.layers)
    return why_not_ahead(model, cache.state.batch, has_windows=has_windows)


@contextmanager
def graphed_decoding(model: PreTrainedModel, cache: ShadowKVCache) -> Iterator[None]:
    """Within, `model.generate(..., past_key_values=cache)` decodes by `DecodeGraphs`; on leaving all is as before.

    Every row of a batch gets a token at every step, as in `generate`.
    """
    if cache.state.batch is None:
        yield
        return
    graphs = DecodeGraphs(model, cache)
    forward, own = model.forward, model.__dict__.get("forward")

    @functools.wraps(forward)
    def decode(*args: Any, **kwargs: Any) -> Any:
        if args or not _is_plain_step(cache, **kwargs):
            return forward(*args, **kwargs)
        logits = graphs.step(kwargs["input_ids"], kwargs.get("position_ids"), kwargs.get("attention_mask"))
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    model.forward = decode
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _is_plain_step(
    cache: ShadowKVCache,
    *,
    input_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    use_cache: bool | None = None,
    cache_position: torch.Tensor | None = None,
    logits_to_keep: int = 0,
    return_dict: bool | None = None,
    **others: Any,
) -> bool:
    """Whether a forward's arguments ask for one token of every sequence, and for nothing but its logits."""
    return (
        past_key_values is cache
        and input_ids is not None
        and input_ids.shape[1] == 1
        and cache.get_seq_length() > 0
        and (position_ids is None or position_ids.dim() == 2)
        and use_cache is not False
        and return_dict is not False
        and not any(value is not None and value is not False for value in others.values())
    )
