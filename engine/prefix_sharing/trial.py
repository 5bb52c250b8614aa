"""Tries a model on a few tokens: compares a tree with its rows, and finds out how the model counts positions.

A batch of three short rows runs as it is, padded on the right and on the left, and as a tree. What holds is a property
of the model, found here for all families alike, before any work is done with it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from longshadow.engine.prefix_sharing.tree import Positions, PrefixTree
from longshadow.engine.prefix_sharing.undisturbed import undisturbed
from longshadow.engine.prefix_sharing.verification import Comparison
from longshadow.engine.switching.interception import intercept

# Columns of padding before the longest row: far enough for positions to differ visibly.
MARGIN = 8
# Offsets of three rows' tokens from the middle of the vocabulary, where special ones are rare.
_ROWS = ((0, 1, 2, 3, 4), (0, 1, 2, 5), (0, 1, 6, 7, 8, 9))


@dataclass(frozen=True, kw_only=True)
class Findings:
    """A model's way of taking batches.

    Attributes:
        reason: why it cannot share; None where it can.
        positions: what a token's position is in a row that is padded on the left: its "column", the number of
            "tokens" before it, "either" where that makes no difference, or None for something else.
        by_length: how it rotates or scales depends on the length of the batch.
        backbone: the one of `backbones_of` that the model's forward calls.
    """

    reason: str | None = None
    backbone: int = 0
    positions: Positions | None = "column"
    by_length: bool = False


def can_be_tried(model: nn.Module) -> bool:
    """All of its weights are here; those of sharded models only are within their own forward."""
    return not is_sharded(model) and not any(parameter.is_meta for parameter in model.parameters())


def is_sharded(model: nn.Module) -> bool:
    """Processes have a part of the weights each, and run their forwards together."""
    parts = (isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())
    return any(parts) or any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def backbones_of(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Candidates for computing the hidden states: the model without its head, or the decoder in that."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    return (model.base_model,) if decoder in (model, model.base_model) else (model.base_model, decoder)


def try_model(model: PreTrainedModel, tree_path: Callable[[nn.Module, PrefixTree], torch.Tensor]) -> Findings:
    """Runs the rows; `tree_path` gives a tree's hidden states [N, L, H] by a backbone."""
    table: Any = model.get_input_embeddings().weight
    device, first = table.device, len(table) // 2
    batches = {side: _batch(first, side, device) for side in ("right", "left")}
    comparisons = {}
    with torch.autocast(device.type, enabled=False):
        try:
            number = _first_called(model, *batches["right"])
            if number is None:
                return Findings(reason="its head does not call its base model")
            backbone = backbones_of(model)[number]
            for side, batch in batches.items():
                comparisons[side] = Comparison.of(
                    lambda ids, mask: _hidden_states(backbone, ids, mask), backbone, *batch
                )
        except Exception:  # it needs what a plain forward lacks, a GPU for one: nothing is known, and nothing refused
            return Findings()
        by_length = _depends_on_length(backbone, model)
        if not comparisons["right"].is_finite:
            return Findings(backbone=number, by_length=by_length)
        found = _compared(batches, comparisons, backbone, functools.partial(tree_path, backbone))
    positions = "column" if by_length and found.positions == "either" else found.positions
    return replace(found, backbone=number, by_length=by_length, positions=positions)


def _first_called(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> int | None:
    """The backbone that the model's forward calls first."""
    called: list[int] = []
    backbones = backbones_of(model)
    undo = [intercept(module, functools.partial(_note, called, number)) for number, module in enumerate(backbones)]
    try:
        with undisturbed(model, ids.device):
            model.forward(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for each in undo:
            each()
    return called[0] if called else None


def _note(called: list[int], number: int, module: nn.Module, forward: Callable[..., Any], /, **kwargs: Any) -> Any:
    called.append(number)
    return forward(**kwargs)


def _hidden_states(backbone: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    output = backbone.forward(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


def _compared(
    batches: dict[str, tuple[torch.Tensor, torch.Tensor]],
    comparisons: dict[str, Comparison],
    backbone: nn.Module,
    tree_path: Callable[[PrefixTree], torch.Tensor],
) -> Findings:
    def difference(side: str, positions: Positions) -> str | None:
        tree = PrefixTree.from_batch(*batches[side], positions=positions)
        with undisturbed(backbone, tree.positions.device):
            shared = tree_path(tree)
        return comparisons[side].difference(shared)

    try:
        different = difference("right", "tokens")
        positions: Positions | None = "column"
        # Some attention gives NaN in fp64 where padding comes first; a tree is as good as that.
        if comparisons["left"].is_finite:
            positions = _positions(difference("left", "column") is None, difference("left", "tokens") is None)
    except ValueError as error:
        return Findings(reason=str(error))
    except Exception as error:
        told = str(error).strip().partition("\n")[0]
        return Findings(reason=f"it cannot run a tree of tokens ({type(error).__name__}: {told})")
    if different is not None:
        return Findings(reason=f"a tree of tokens gave other hidden states than their rows, {different}")
    return Findings(positions=positions)


def _positions(column: bool, tokens: bool) -> Positions | None:
    if column and tokens:
        return "either"
    if column:
        return "column"
    return "tokens" if tokens else None


def _batch(first: int, side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, _ROWS)) + (MARGIN if side == "left" else 0)
    ids = torch.zeros(len(_ROWS), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(_ROWS):
        cells = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[index, cells] = first + torch.tensor(row)
        mask[index, cells] = 1
    return ids.to(device), mask.to(device)


def _depends_on_length(backbone: nn.Module, model: PreTrainedModel) -> bool:
    """Frequencies that follow the longest position, or scales that follow each."""
    kinds: list[Any] = [getattr(module, "rope_type", None) for module in backbone.modules()]
    for kind in [kind for kind in kinds if isinstance(kind, dict)]:
        kinds.extend(kind.values())
    if any("dynamic" in kind or kind == "longrope" for kind in kinds if isinstance(kind, str)):
        return True
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    return bool(getattr(config, "attn_temperature_tuning", False)) or "llama_4_scaling_beta" in str(rope)
