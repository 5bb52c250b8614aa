"""`share_prefixes`: a model's backbone computes tokens that rows have in common once.

Only the backbone's forward is wrapped. Whoever calls the model passes its ordinary padded batch and gets hidden
states in that shape, so losses, metrics and adapters know nothing of it.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from longshadow.engine.prefix_sharing.eligibility import is_generation, why_model_cannot, why_ordinary
from longshadow.engine.prefix_sharing.expand import expand_cells, expand_nodes
from longshadow.engine.prefix_sharing.head import LABELLED
from longshadow.engine.prefix_sharing.interface import SHARED, SharedBatch, offer_tree_attention
from longshadow.engine.prefix_sharing.options import SharingOptions
from longshadow.engine.prefix_sharing.report import SharingReport
from longshadow.engine.prefix_sharing.tree import PrefixTree, forget_batch, tree_of_batch
from longshadow.engine.prefix_sharing.trial import Findings, backbones_of, can_be_tried, is_sharded, try_model
from longshadow.engine.prefix_sharing.undisturbed import undisturbed
from longshadow.engine.prefix_sharing.verification import NUM_PASSES, kind_of, why_different
from longshadow.engine.switching.attention import outside_graphs
from longshadow.engine.switching.interception import around, intercept
from longshadow.engine.switching.text_model import unwrapped

logger = logging.getLogger(__name__)

_findings: WeakKeyDictionary[PreTrainedModel, Findings] = WeakKeyDictionary()
MISMATCH = "a shared batch did not agree with the ordinary path"


@dataclass(eq=False, kw_only=True)
class _Sharing:
    model: PreTrainedModel
    backbone: nn.Module
    findings: Findings
    options: SharingOptions
    report: SharingReport
    undo: tuple[Callable[[], None], ...] = ()
    told_of_dropout: bool = False
    verified: set[tuple[bool, int]] = field(default_factory=set)
    differs: bool = False
    is_sharded: bool | None = None

    def around(self, backbone: nn.Module, forward: Callable[..., Any], /, **kwargs: Any) -> Any:
        """The backbone's forward while it shares."""
        if is_generation(kwargs) and LABELLED not in kwargs:
            return forward(**kwargs)
        return _shared_forward(self, forward, **kwargs)


@contextmanager
def share_prefixes(
    model: nn.Module,
    *,
    minimum_ratio: float = 1.1,
    verify_first_batch: bool = True,
    on_mismatch: Literal["raise", "ordinary"] = "raise",
    attention: str = "auto",
    report: SharingReport | None = None,
) -> Iterator[SharingReport]:
    """Within, forwards of `model` compute each distinct prefix token once; results stay those of the padded batch.

    Args:
        model: a causal language model of transformers, or one inside PEFT's, torch.compile's or a data-parallel
            wrapper.
        minimum_ratio: batches with fewer padded tokens per distinct token than this run the ordinary way; at
            least 1.
        verify_first_batch: compare the first shared batch of each kind (padded left or not, and by how much it
            shares, to a factor of two) with the ordinary path, without dropout. They differ where that is more than
            ten times what one more column of padding changes.
        on_mismatch: "raise" RuntimeError where they differ, or run this and all later batches the "ordinary" way.
        attention: how the tree is attended to, "auto", "dense", "chains", "flex" or "varlen"; see
            `longshadow.engine.prefix_sharing.attention`.
        report: one to go on counting in.

    Yields a report of what was shared. Raises ValueError for models that cannot be shared, with the reason. Within
    another block of the same model and options nothing changes, and the outer one ends it.
    """
    already = is_sharing(model)
    report = enable_prefix_sharing(
        model,
        minimum_ratio=minimum_ratio,
        verify_first_batch=verify_first_batch,
        on_mismatch=on_mismatch,
        attention=attention,
        report=report,
    )
    try:
        yield report
    finally:
        if not already:
            disable_prefix_sharing(model)


def enable_prefix_sharing(
    model: nn.Module,
    *,
    minimum_ratio: float = 1.1,
    verify_first_batch: bool = True,
    on_mismatch: Literal["raise", "ordinary"] = "raise",
    attention: str = "auto",
    report: SharingReport | None = None,
) -> SharingReport:
    """As `share_prefixes`, until `disable_prefix_sharing`. Where it is enabled already, the report it counts in."""
    options = SharingOptions(
        minimum_ratio=minimum_ratio, verify_first_batch=verify_first_batch, on_mismatch=on_mismatch, attention=attention
    )
    sharing = _sharing_of(model)
    if sharing is not None:
        if sharing.options != options:
            raise ValueError(
                f"prefix sharing is already enabled for this model, with {sharing.options}: disable it first"
            )
        return sharing.report
    findings = check_sharing(model)
    language_model = language_model_of(model)
    backbone = backbones_of(language_model)[findings.backbone]
    sharing = _Sharing(
        model=language_model,
        backbone=backbone,
        findings=findings,
        options=options,
        report=SharingReport(reasons={}) if report is None else report,
    )
    sharing.undo = offer_tree_attention(language_model), intercept(backbone, sharing.around)
    return sharing.report


def disable_prefix_sharing(model: nn.Module) -> None:
    """Gives the model its own forward and attention back; nothing where it has them."""
    sharing = _sharing_of(model)
    if sharing is None:
        return
    for undo in sharing.undo:
        undo()
    forget_batch()


def is_sharing(model: nn.Module) -> bool:
    """Sharing is enabled for the model."""
    return _sharing_of(model) is not None


def check_sharing(model: nn.Module) -> Findings:
    """Finds out how a model shares prefixes. Raises ValueError where it cannot, with the reason."""
    language_model = language_model_of(model)
    reason = why_model_cannot(model, language_model)
    findings = _findings.get(language_model, Findings())
    if reason is None and language_model not in _findings and can_be_tried(language_model):
        withdraw = offer_tree_attention(language_model)
        try:
            findings = try_model(language_model, _run_trial)
        finally:
            withdraw()
        _findings[language_model] = findings
    reason = reason or findings.reason
    if reason is not None:
        raise ValueError(f"{type(language_model).__name__} cannot share prefixes: {reason}")
    return findings


def _run_trial(backbone: nn.Module, tree: PrefixTree) -> torch.Tensor:
    hidden: torch.Tensor = _run_tree(backbone.forward, tree, "chains", None, {}).last_hidden_state
    return hidden


def _sharing_of(model: nn.Module) -> _Sharing | None:
    backbones = backbones_of(language_model_of(model))
    owners = (getattr(each, "__self__", None) for backbone in backbones for each in around(backbone))
    return next((owner for owner in owners if isinstance(owner, _Sharing)), None)


def language_model_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model, without the wrappers around it."""
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel) or inner.base_model is inner:
        raise ValueError(
            f"prefix sharing needs a transformers model with a head, or PEFT around one, got {type(model).__name__}"
        )
    return inner


@outside_graphs
def _shared_forward(
    sharing: _Sharing,
    forward: Callable[..., Any],
    /,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    labelled: torch.Tensor | None = kwargs.pop(LABELLED, None)
    tree, reason = _tree_of(sharing, input_ids, attention_mask, kwargs)
    is_first = tree is not None and sharing.options.verify_first_batch and kind_of(tree) not in sharing.verified
    if _someone_compares(sharing, is_first):
        tree, reason = _verified(sharing, forward, tree, reason, input_ids, attention_mask, kwargs)
    if tree is None:
        if reason is not None:
            _count_ordinary(sharing.report, reason)
        output = forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if labelled is not None:
            output.last_hidden_state = _one_row(output.last_hidden_state[labelled])
        return output
    if not sharing.told_of_dropout and _has_dropout(sharing.backbone):
        logger.warning(
            "prefix sharing: with dropout, rows share the masks of their common tokens, so losses are other draws of "
            "the same distribution, not the same numbers"
        )
        sharing.told_of_dropout = True
    sharing.report.shared_batches += 1
    sharing.report.padded_tokens += tree.node_of.numel()
    sharing.report.real_tokens += tree.num_real_tokens
    sharing.report.unique_tokens += tree.num_tokens
    return _run_tree(forward, tree, sharing.options.attention, labelled, kwargs, check_padding=is_first)


def _verified(
    sharing: _Sharing,
    forward: Callable[..., Any],
    tree: PrefixTree | None,
    reason: str | None,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[PrefixTree | None, str | None]:
    """The tree where it agrees with the ordinary path, or why the batch runs that way."""

    def ordinary(ids: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        hidden: torch.Tensor = forward(input_ids=ids, attention_mask=mask, **kwargs).last_hidden_state
        return hidden

    if tree is None:  # another process compares, and needs this one in its forwards
        for _ in range(NUM_PASSES):
            with undisturbed(sharing.backbone, sharing.model.device):
                ordinary(input_ids, attention_mask)
        return None, reason
    assert input_ids is not None
    difference = why_different(
        ordinary,
        lambda: _run_tree(forward, tree, sharing.options.attention, None, kwargs).last_hidden_state,
        sharing.backbone,
        input_ids,
        attention_mask,
    )
    if difference is None:
        sharing.verified.add(kind_of(tree))
        sharing.report.verified_kinds = len(sharing.verified)
        return tree, None
    if sharing.options.on_mismatch == "raise":
        raise RuntimeError(difference)
    logger.warning("%s; its batches run the ordinary way", difference)
    sharing.differs = True
    return None, MISMATCH


def _someone_compares(sharing: _Sharing, is_first: bool) -> bool:
    """This process, or where weights are sharded any of them: their forwards have to be as many."""
    if sharing.is_sharded is None:
        sharing.is_sharded = is_sharded(sharing.backbone)  # only now, as trainers shard what shares already
    if not sharing.is_sharded or not sharing.options.verify_first_batch or not torch.distributed.is_initialized():
        return is_first
    flag = torch.tensor(float(is_first), device=sharing.model.device)
    torch.distributed.all_reduce(flag)
    return bool(flag > 0)


def _count_ordinary(report: SharingReport, reason: str) -> None:
    if reason not in report.reasons:
        logger.warning("prefix sharing: a batch runs the ordinary way, %s", reason)
    report.reasons[reason] = report.reasons.get(reason, 0) + 1
    report.ordinary_batches += 1


def _has_dropout(backbone: nn.Module) -> bool:
    return any(
        isinstance(value, float) and value > 0
        for module in backbone.modules()
        if module.training
        for name, value in vars(module).items()
        if "drop" in name or "jitter" in name or (name == "p" and isinstance(module, nn.Dropout))
    )


def _tree_of(
    sharing: _Sharing, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> tuple[PrefixTree | None, str | None]:
    """The tree of a batch, or the reason why it runs the ordinary way; neither for generation."""
    if is_generation(kwargs):
        return None, None
    if sharing.differs:
        return None, MISMATCH
    reason = why_ordinary(sharing.model, sharing.backbone, input_ids, attention_mask, kwargs)
    if reason is not None:
        return None, reason
    assert input_ids is not None
    findings = sharing.findings
    try:
        tree = tree_of_batch(input_ids, attention_mask, positions=findings.positions or "column")
    except ValueError as error:
        return None, str(error)
    if tree.padded_left and findings.positions is None:
        return None, "it is padded on the left, where the model counts positions in a way of its own"
    if findings.by_length and not bool(tree.is_real[:, -1].any()):
        return None, "its last column is padding, and the model's positions depend on the length of a batch"
    if tree.token_ratio < sharing.options.minimum_ratio:
        return None, f"it has fewer than {sharing.options.minimum_ratio:g} padded tokens per distinct token"
    return tree, None


def _run_tree(
    forward: Callable[..., Any],
    tree: PrefixTree,
    attention: str,
    labelled: torch.Tensor | None,
    kwargs: dict[str, Any],
    *,
    check_padding: bool = False,
) -> Any:
    """The backbone's output over the tree, for all cells [N, L] or for the labelled ones as one row."""
    kwargs = {
        name: given for name, given in kwargs.items() if given is not None and name not in ("use_cache", "return_dict")
    }
    # A mask of four dimensions is handed on as it is, so none of T x T is ever made.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tree.token_ids.device)
    batch = SharedBatch(tree=tree, attention=attention)
    output = forward(
        input_ids=tree.token_ids.unsqueeze(0),
        attention_mask=mask,
        position_ids=tree.positions.unsqueeze(0),
        use_cache=False,
        return_dict=True,
        **{SHARED: batch},
        **kwargs,
    )
    if not batch.num_attended:
        raise ValueError("its layers do not hand a tree on to their attention")
    nodes = output.last_hidden_state[0]
    if labelled is None:
        output.last_hidden_state = expand_nodes(nodes, tree, check_padding=check_padding)
    else:
        output.last_hidden_state = _one_row(expand_cells(nodes, tree, labelled))
    if getattr(output, "router_logits", None) is not None:
        output.router_logits = tuple(
            expand_nodes(logits, tree).flatten(0, 1) for logits in output.router_logits if logits is not None
        )
    return output


def _one_row(cells: torch.Tensor) -> torch.Tensor:
    """[M, H] -> [1, M + 1, H]: a head drops the last position of a row, as it predicts nothing."""
    return F.pad(cells, (0, 0, 0, 1)).unsqueeze(0)
