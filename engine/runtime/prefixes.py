"""Heads of earlier prompts, kept exactly, for prompts that begin alike; least recently used first out.

A compressed prompt is no longer what the model saw of it, so what is kept are the exact keys and values of the
unfinished prompt: a request that goes on from them computes what it would have computed without.

Legend: H KV heads, n tokens, D head_dim.
"""

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import torch

from longshadow.engine.runtime.batch import Chunk
from longshadow.engine.runtime.memory import Bytes
from longshadow.engine.runtime.state import BLOCK_TOKENS, BlockedEnergy, SequenceState
from longshadow.engine.shadowkv.sequence import Sequence
from longshadow.engine.shadowkv.storage import ExactTokens


@dataclass(frozen=True, eq=False, kw_only=True)
class Head:
    """The tokens of a prompt.

    Attributes:
        tokens: [n], whole blocks.
        layers: their keys and values in each layer, at least n.
        energies: in each full-attention layer the query energy at each block's end; empty where it is not used.
        bytes: what it takes.
    """

    tokens: torch.Tensor
    layers: list[ExactTokens]
    energies: list[list[torch.Tensor]]
    bytes: Bytes


class PrefixCache:
    """Heads by use. `limit` bounds their bytes; the owner of the memory may evict more."""

    def __init__(self, limit: Bytes, stored: Callable[[int], Bytes]) -> None:
        """`stored`: bytes of exact tokens by place."""
        self._limit = limit
        self._stored = stored
        self._heads: OrderedDict[int, Head] = OrderedDict()
        self._next = 0
        self.bytes = Bytes()
        self.num_hits = self.num_queries = 0

    def __len__(self) -> int:
        return len(self._heads)

    def match(self, prompt: list[int]) -> tuple[Head, int] | None:
        """The head that begins like `prompt` for the longest, and for how many tokens; fewer than the prompt's."""
        best, length = self._longest(torch.tensor(prompt[:-1]))
        self.num_queries += 1
        if best is None:
            return None
        self.num_hits += 1
        self._heads.move_to_end(best)
        return self._heads[best], length

    def _longest(self, wanted: torch.Tensor) -> tuple[int | None, int]:
        best, best_length = None, 0
        for key, head in self._heads.items():
            length = _common_length(head.tokens, wanted)
            if length > best_length:
                best, best_length = key, length
        return best, best_length

    def would_gain(self, prompt: list[int], coming: Sequence_[list[int]]) -> bool:
        """Whether one of the `coming` heads shares more with `prompt` than those that are here."""
        if not coming:
            return False
        wanted = torch.tensor(prompt[:-1])
        _, length = self._longest(wanted)
        return any(_common_length(torch.tensor(other), wanted) > length for other in coming)

    def size(self, num_tokens: int, token_bytes: int, energy_bytes: int) -> Bytes:
        """What the head of a prompt of so many tokens takes."""
        num_blocks = num_tokens // BLOCK_TOKENS
        return self._stored(num_tokens * token_bytes) + Bytes(device=num_blocks * energy_bytes)

    def admits(self, size: Bytes) -> bool:
        """Whether a head of this size is worth trying: it does not exceed the limit by itself."""
        return size.device <= self._limit.device and size.host <= self._limit.host

    def put(self, head: Head) -> Bytes:
        """Keeps a head; returns the bytes of those that had to go for it."""
        freed = Bytes()
        for key, other in list(self._heads.items()):
            if _common_length(other.tokens, head.tokens) == len(other.tokens):
                freed += self._remove(key)
        while not self.admits(self.bytes + head.bytes):
            freed += self.evict()
        self._heads[self._next] = head
        self._next += 1
        self.bytes += head.bytes
        return freed

    def covers(self, prompt: list[int]) -> bool:
        """Whether a head holds all whole blocks of `prompt`."""
        wanted = torch.tensor(prompt[: len(prompt) - len(prompt) % BLOCK_TOKENS])
        return any(_common_length(head.tokens, wanted) == len(wanted) for head in self._heads.values())

    def evict(self) -> Bytes:
        """Forgets the head that was not used for longest; returns its bytes."""
        return self._remove(next(iter(self._heads)))

    def _remove(self, key: int) -> Bytes:
        freed = self._heads.pop(key).bytes
        self.bytes -= freed
        return freed


def _common_length(first: torch.Tensor, second: torch.Tensor) -> int:
    """Tokens for which both begin alike, in whole blocks."""
    count = min(len(first), len(second))
    differing = (first[:count] != second[:count]).nonzero()
    length = int(differing[0]) if len(differing) else count
    return length - length % BLOCK_TOKENS


def resume(state: SequenceState, head: Head, num_tokens: int, num_prompt: int, device: torch.device) -> None:
    """Makes an empty sequence one that has parked the first tokens of `head`."""
    energies = iter(head.energies)
    for layer, kept in zip(state.layers, head.layers, strict=True):
        layer.parked = ExactTokens(device=kept.keys.device, capacity=num_prompt)
        layer.parked.append(kept.keys[:, :num_tokens], kept.values[:, :num_tokens])
        layer.device = device
        if isinstance(layer, Sequence) and isinstance(layer.query_energy, BlockedEnergy):
            layer.query_energy = BlockedEnergy(next(energies)[: num_tokens // BLOCK_TOKENS])
    state.num_tokens = num_tokens


def head_of(chunk: Chunk, prompt: list[int], size: Bytes) -> Head:
    """The head of a prompt whose last chunk has just been read; take it before the state forgets its blocks."""
    num_tokens = len(prompt) - len(prompt) % BLOCK_TOKENS
    energies = [
        layer.query_energy.sums
        for layer in chunk.state.layers
        if isinstance(layer, Sequence) and isinstance(layer.query_energy, BlockedEnergy)
    ]
    return Head(tokens=torch.tensor(prompt[:num_tokens]), layers=chunk.head, energies=energies, bytes=size)
