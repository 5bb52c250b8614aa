"""The calls that a model makes of its decoder blocks, taken from its own forward, so that none has to be guessed.

Masks and rotations differ with a layer's type, some layers are given inputs of their own, and some what earlier ones
left. So the model itself runs as far as the block, and the blocks before it answer at once with what is known of them:
all that later ones may depend on is the last one's output, and what blocks leave in mappings that they share.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from transformers import Cache

Result = TypeVar("Result")
Forward = Callable[..., Any]
Key = int | str


@dataclass(frozen=True, eq=False, kw_only=True)
class Before:
    """Outputs of the blocks before, for one sample.

    Attributes:
        output: all that the last one returned.
        left: what they put into mappings among their arguments, by argument and key.
    """

    output: Any = None
    left: Mapping[Key, Mapping[Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """Arguments of a block for one sample."""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states among them."""
        hidden: torch.Tensor = self.positional[0] if self.positional else self.named["hidden_states"]
        return hidden

    def with_hidden(self, hidden: torch.Tensor) -> "Call":
        """The same with other hidden states."""
        if self.positional:
            return Call(positional=(hidden, *self.positional[1:]), named=self.named)
        return Call(positional=(), named=self.named | {"hidden_states": hidden})

    def of(self, forward: Forward, before: Before) -> Before:
        """Calls `forward`; these arguments stay as they are, so that it can be done again."""
        used = Call(
            positional=tuple(map(_copied, self.positional)),
            named={name: _copied(value) for name, value in self.named.items()},
        )
        output = forward(*used.positional, **used.named)
        left = dict(before.left)
        after = dict(used.mappings())
        for key, mapping in self.mappings():
            new = {name: value for name, value in after[key].items() if mapping.get(name) is not value}
            if new:
                left[key] = {**left.get(key, {}), **new}
        return Before(output=output, left=left)

    def mappings(self) -> Iterator[tuple[Key, MutableMapping[Any, Any]]]:
        """Arguments that a block may put something into."""
        arguments: dict[Any, Any] = {**dict(enumerate(self.positional)), **self.named}
        for key, value in arguments.items():
            if isinstance(value, MutableMapping):
                yield key, value

    def restore(self, left: Mapping[Key, Mapping[Any, Any]]) -> None:
        """Puts in what blocks before have left."""
        for key, mapping in self.mappings():
            mapping.update(left.get(key, {}))


class _Reached(Exception):
    """The block was called."""


def at_block(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    number: int,
    tokens: torch.Tensor,
    before: Before,
    act: Callable[[Forward, Call], Result],
) -> Result:
    """Runs the model on token ids [1, length] as far as block `number`, and gives what `act` makes of its call.

    `act` is given the block's own forward, too.

    Raises ValueError for a model that does not call the block.
    """
    found: list[Result] = []

    def reached(own: Forward) -> Forward:
        def forward(*positional: Any, **named: Any) -> Any:
            call = Call(positional=positional, named=named)
            call.restore(before.left)
            found.append(act(own, call))
            raise _Reached

        return forward

    with answering(blocks[:number], before.output), _replaced(blocks[number], reached):
        try:
            model(input_ids=tokens, use_cache=False)
        except _Reached:
            return found[0]
    raise ValueError(f"{type(model).__name__} does not call its block {number}: it cannot be compensated yet")


@contextmanager
def answering(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Within, the last of the blocks answers with the output, at once, and those before it with what is no number."""
    unknown = tree_map(_not_numbers, output) if len(blocks) > 1 else None

    def answer(with_what: Any) -> Callable[[Forward], Forward]:
        return lambda own: lambda *positional, **named: with_what

    with ExitStack() as stack:
        for block in blocks[:-1]:
            stack.enter_context(_replaced(block, answer(unknown)))
        for block in blocks[-1:]:
            stack.enter_context(_replaced(block, answer(output)))
        yield


@torch.no_grad()
def recorded(
    model: nn.Module, blocks: Sequence[nn.Module], number: int, samples: torch.Tensor, before: Sequence[Before]
) -> list[Call]:
    """The calls of block `number` for token ids [samples, length]; tensors that all of them share are kept once.

    Raises ValueError where the block depends on more than is known of the blocks before.
    """
    calls: list[Call] = []
    for sample, known in zip(samples, before, strict=True):
        call = at_block(model, blocks, number, sample.unsqueeze(0), known, lambda own, call: call)
        if not calls and _is_number(known.output) and not _is_number((call.positional, call.named)):
            raise ValueError(
                f"{type(model).__name__} gives block {number} what blocks long before it have made: it cannot be "
                "compensated yet"
            )
        positional, named = tree_map(_compact, (call.positional, call.named))
        call = Call(positional=positional, named=named)
        calls.append(_sharing(calls[0], call) if calls else call)
    return calls


def _sharing(first: Call, call: Call) -> Call:
    """The call with the first one's tensors where they are the same, such as masks and rotations."""
    ones, shape = tree_flatten((first.positional, first.named))
    others, own_shape = tree_flatten((call.positional, call.named))
    if shape != own_shape:
        return call
    positional, named = tree_unflatten(list(map(_same, ones, others)), shape)
    return Call(positional=positional, named=named)


def _same(one: Any, other: Any) -> Any:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return other
    alike = one.dtype == other.dtype and one.shape == other.shape and one.device == other.device
    return one if alike and torch.equal(one, other) else other


def _compact(value: Any) -> Any:
    """A copy of what is a small part of something, such as one block's share of the inputs of all."""
    is_part = isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > 2 * value.nbytes
    return value.clone() if is_part else value


def _copied(value: Any) -> Any:
    """Copies what a block may change."""
    if isinstance(value, MutableMapping):
        return copy.copy(value)
    return copy.deepcopy(value) if isinstance(value, Cache) else value


def _not_numbers(value: Any) -> Any:
    return torch.full_like(value, torch.nan) if _is_floating(value) else value


def _is_number(values: Any) -> bool:
    return not any(bool(value.isnan().any()) for value in tree_leaves(values) if _is_floating(value))


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@contextmanager
def _replaced(block: nn.Module, make: Callable[[Forward], Forward]) -> Iterator[None]:
    """Within, the block has another forward, made of its own."""
    kept, own = vars(block).get("forward"), block.forward
    block.forward = make(own)
    try:
        yield
    finally:
        if kept is None:
            del block.forward
        else:
            block.forward = kept
