"""`share_prefixes`: a model's backbone computes tokens that rows have in common once.

Only the backbone's forward is wrapped. Whoever calls the model passes its ordinary padded batch and gets hidden
states in that shape, so losses, metrics and adapters know nothing of it.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from longshadow.engine.prefix_sharing.attention import NAMES
from longshadow.engine.prefix_sharing.expand import expand_cells, expand_nodes
from longshadow.engine.prefix_sharing.head import LABELLED, project_every_cell
from longshadow.engine.prefix_sharing.interface import SHARED, SharedBatch, offer_tree_attention
from longshadow.engine.prefix_sharing.tree import PrefixTree, forget_batch, tree_of_batch
from longshadow.engine.prefix_sharing.verification import verify_first_batch
from longshadow.engine.switching.attention import outside_graphs
from longshadow.engine.switching.interception import around, intercept
from longshadow.engine.switching.text_model import unwrapped

logger = logging.getLogger(__name__)

SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(kw_only=True)
class SharingReport:
    """What sharing did since it was enabled.

    Attributes:
        shared_batches, ordinary_batches: forwards that went each way. Those of generation, which fill or continue a
            cache, are neither.
        padded_tokens, real_tokens, unique_tokens: of the shared batches; real ones are no padding, and padded over
            unique is how much less the backbone had to compute.
        reasons: why forwards went the ordinary way, and how often.
        verified: the first shared batch was compared with the ordinary path.
    """

    shared_batches: int = 0
    ordinary_batches: int = 0
    padded_tokens: int = 0
    real_tokens: int = 0
    unique_tokens: int = 0
    reasons: dict[str, int]
    verified: bool = False

    @property
    def token_ratio(self) -> float:
        """Padded tokens per distinct one; 1 where nothing was shared."""
        return self.padded_tokens / self.unique_tokens if self.unique_tokens else 1.0


@dataclass(eq=False, kw_only=True)
class _Sharing:
    model: PreTrainedModel
    backbone: nn.Module
    minimum_ratio: float
    verify_first_batch: bool
    attention: str
    report: SharingReport
    undo: tuple[Callable[[], None], ...] = ()
    told_of_dropout: bool = False

    def around(self, backbone: nn.Module, forward: Callable[..., Any], /, **kwargs: Any) -> Any:
        """The backbone's forward while it shares."""
        if _is_generation(kwargs) and LABELLED not in kwargs:
            return forward(**kwargs)
        return _shared_forward(self, forward, **kwargs)


@contextmanager
def share_prefixes(
    model: nn.Module, *, minimum_ratio: float = 1.1, verify_first_batch: bool = True, attention: str = "auto"
) -> Iterator[SharingReport]:
    """Within, forwards of `model` compute each distinct prefix token once; results stay those of the padded batch.

    Args:
        model: a causal language model of transformers, or one inside PEFT's, torch.compile's or a data-parallel
            wrapper.
        minimum_ratio: batches with fewer padded tokens per distinct token than this run the ordinary way; at
            least 1.
        verify_first_batch: compare the first shared batch with the ordinary path, without dropout, and raise
            RuntimeError where they differ by more than ten times what one more column of padding changes.
        attention: how the tree is attended to, "auto", "dense", "chains", "flex" or "varlen"; see
            `longshadow.engine.prefix_sharing.attention`.

    Yields a report of what was shared. Raises ValueError for models that cannot be shared, with the reason.
    """
    report = enable_prefix_sharing(
        model, minimum_ratio=minimum_ratio, verify_first_batch=verify_first_batch, attention=attention
    )
    try:
        yield report
    finally:
        disable_prefix_sharing(model)


def enable_prefix_sharing(
    model: nn.Module, *, minimum_ratio: float = 1.1, verify_first_batch: bool = True, attention: str = "auto"
) -> SharingReport:
    """As `share_prefixes`, until `disable_prefix_sharing`."""
    if not minimum_ratio >= 1:
        raise ValueError(f"minimum_ratio must be at least 1, got {minimum_ratio}")
    if attention not in NAMES:
        raise ValueError(f"attention must be one of {', '.join(NAMES)}, got {attention!r}")
    language_model = language_model_of(model)
    backbone = language_model.base_model
    if _sharing_of(backbone) is not None:
        raise ValueError("prefix sharing is already enabled for this model")
    reason = _why_not(model, language_model)
    if reason is not None:
        raise ValueError(f"{type(language_model).__name__} cannot share prefixes: {reason}")
    sharing = _Sharing(
        model=language_model,
        backbone=backbone,
        minimum_ratio=minimum_ratio,
        verify_first_batch=verify_first_batch,
        attention=attention,
        report=SharingReport(reasons={}),
    )
    sharing.undo = offer_tree_attention(language_model), intercept(backbone, sharing.around)
    return sharing.report


def disable_prefix_sharing(model: nn.Module) -> None:
    """Gives the model its own forward and attention back."""
    language_model = language_model_of(model)
    backbone = language_model.base_model
    sharing = _sharing_of(backbone)
    if sharing is None:
        raise ValueError("prefix sharing is not enabled for this model")
    project_every_cell(language_model)
    for undo in sharing.undo:
        undo()
    forget_batch()


def _sharing_of(backbone: nn.Module) -> _Sharing | None:
    owners = (getattr(each, "__self__", None) for each in around(backbone))
    return next((owner for owner in owners if isinstance(owner, _Sharing)), None)


def language_model_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model, without the wrappers around it."""
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel) or inner.base_model is inner:
        raise ValueError(
            f"prefix sharing needs a transformers model with a head, or PEFT around one, got {type(model).__name__}"
        )
    return inner


def _why_not(model: nn.Module, language_model: PreTrainedModel) -> str | None:
    config = language_model.config.get_text_config(decoder=True)
    others = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYERS
    if others:
        return f"it has layers of type {', '.join(sorted(others))}"
    if language_model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if not language_model._supports_attention_backend:
        return "its attention does not go through transformers' attention interface"
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and getattr(adapter, "is_prompt_learning", False):
        return "prompt-learning adapters put their own tokens before each row"
    return None


@outside_graphs
def _shared_forward(
    sharing: _Sharing,
    forward: Callable[..., Any],
    /,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    backbone = sharing.backbone
    labelled: torch.Tensor | None = kwargs.pop(LABELLED, None)
    tree, reason = _tree_of(sharing, input_ids, attention_mask, kwargs)
    if tree is None:
        if reason is not None:
            _count_ordinary(sharing.report, reason)
        output = forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if labelled is not None:
            output.last_hidden_state = _one_row(output.last_hidden_state[labelled])
        return output
    assert input_ids is not None
    if sharing.verify_first_batch and not sharing.report.verified:
        verify_first_batch(
            lambda ids, mask: forward(input_ids=ids, attention_mask=mask, **kwargs).last_hidden_state,
            lambda: _run_tree(sharing, forward, tree, None, kwargs).last_hidden_state,
            backbone,
            input_ids,
            attention_mask,
        )
        sharing.report.verified = True
    if not sharing.told_of_dropout and _has_dropout(backbone):
        logger.warning(
            "prefix sharing: with dropout, rows share the masks of their common tokens, so losses are other draws of "
            "the same distribution, not the same numbers"
        )
        sharing.told_of_dropout = True
    sharing.report.shared_batches += 1
    sharing.report.padded_tokens += input_ids.numel()
    sharing.report.real_tokens += tree.num_real_tokens
    sharing.report.unique_tokens += tree.num_tokens
    return _run_tree(sharing, forward, tree, labelled, kwargs)


def _count_ordinary(report: SharingReport, reason: str) -> None:
    if reason not in report.reasons:
        logger.warning("prefix sharing: a batch runs the ordinary way, %s", reason)
    report.reasons[reason] = report.reasons.get(reason, 0) + 1
    report.ordinary_batches += 1


def _has_dropout(backbone: nn.Module) -> bool:
    rates = (getattr(module, "attention_dropout", 0) for module in backbone.modules() if module.training)
    layers = (module.p for module in backbone.modules() if isinstance(module, nn.Dropout) and module.training)
    return any(isinstance(rate, float) and rate > 0 for rate in (*rates, *layers))


def _is_generation(kwargs: dict[str, Any]) -> bool:
    """The forward fills or continues a cache, transformers' own or the one of continuous batching."""
    if kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None:
        return True
    return bool(kwargs.get("use_cache")) and not torch.is_grad_enabled()


def _tree_of(
    sharing: _Sharing, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> tuple[PrefixTree | None, str | None]:
    """The tree of a batch, or the reason why it runs the ordinary way; neither for generation."""
    if _is_generation(kwargs):
        return None, None
    if input_ids is None or kwargs.get("inputs_embeds") is not None:
        return None, "it comes as embeddings"
    if kwargs.get("position_ids") is not None:
        return None, "it brings its own position_ids"
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name, getattr(sharing.model.config, name, False)):
            return None, f"{name} is asked for"
    if any(
        name.startswith(("pixel", "image", "video", "audio")) for name, given in kwargs.items() if given is not None
    ):
        return None, "it has images, video or audio"
    embedding = sharing.model.get_input_embeddings()
    if embedding.training and getattr(embedding, "neftune_noise_alpha", None):
        return None, "NEFTune scales its noise by the columns of the batch"
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        return None, "its mask is not [rows, columns]"
    try:
        tree = tree_of_batch(input_ids, attention_mask)
    except ValueError as error:
        return None, str(error)
    if tree.token_ratio < sharing.minimum_ratio:
        return None, f"it has fewer than {sharing.minimum_ratio:g} padded tokens per distinct token"
    return tree, None


def _run_tree(
    sharing: _Sharing,
    forward: Callable[..., Any],
    tree: PrefixTree,
    labelled: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> Any:
    """The backbone's output over the tree, for all cells [N, L] or for the labelled ones as one row."""
    kwargs = {
        name: given for name, given in kwargs.items() if given is not None and name not in ("use_cache", "return_dict")
    }
    # A mask of four dimensions is handed on as it is, so none of T x T is ever made.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tree.token_ids.device)
    output = forward(
        input_ids=tree.token_ids.unsqueeze(0),
        attention_mask=mask,
        position_ids=tree.positions.unsqueeze(0),
        use_cache=False,
        return_dict=True,
        **{SHARED: SharedBatch(tree=tree, attention=sharing.attention)},
        **kwargs,
    )
    nodes = output.last_hidden_state[0]
    if labelled is None:
        output.last_hidden_state = expand_nodes(nodes, tree)
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
