"""Perplexity of teacher-forced decoding after a long prefix, relative to full attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from bench.baselines.exact_cache import ExactCache
from bench.methods import FULL_ATTENTION, DecodePlan, Method, all_methods, open_cache
from bench.prose import language_reference, library_docstrings, passages
from bench.quality import check_full_size, feed, prefill
from bench.record import Row
from bench.session import Session
from bench.table import Column, Outcome, Table, Target
from longshadow.models import LoadedModel, load_model


@dataclass(frozen=True, kw_only=True)
class Config:
    """`num_texts` passages of `prefix_tokens` and `decoded_tokens`, half of them from each source of prose.

    `local_tokens` are ShadowKV's.
    """

    num_texts: int = 8
    prefix_tokens: int = 4000
    decoded_tokens: int = 256
    fractions: tuple[float, ...] = (1 / 8, 1 / 16, 1 / 32)
    ranks: tuple[int, ...] = (64, 32)
    local_tokens: int = 32


def run(config: Config, session: Session) -> Outcome:
    """Every text and method is one unit; the methods of a text share one exact prefill."""
    loaded = load_model("demo", dtype=torch.float32, device=session.device)
    methods = all_methods(config.fractions, config.ranks)
    texts = make_texts(loaded, config)
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        check = check_full_size(loaded.model, texts[0][: config.prefix_tokens], texts[0][config.prefix_tokens])
        for index, text in enumerate(texts):
            # Not run at all when an earlier run has finished every method of the text.
            shared = cache(partial(prefill, loaded.model, text[: config.prefix_tokens]))
            for number, method in enumerate(methods):
                unit = f"text {index + 1} of {len(texts)}, {method.name} at {method.fraction:.4f}"
                session.progress(f"{unit} ({number + 1} of {len(methods)})")
                results.append(session.unit(unit, partial(measure, loaded.model, shared, text, method, config)))
    return Outcome(rows=summarize(results, methods), check=check)


def make_texts(loaded: LoadedModel, config: Config) -> list[list[int]]:
    """Passages of prefix and continuation, alternately from the language reference and from docstrings."""
    length = config.prefix_tokens + config.decoded_tokens + 1
    half = math.ceil(config.num_texts / 2)
    sources = [
        passages(loaded.tokenizer(text, add_special_tokens=False).input_ids, count=half, length=length)
        for text in (language_reference(), library_docstrings())
    ]
    return [text for pair in zip(*sources, strict=True) for text in pair][: config.num_texts]


def measure(
    model: PreTrainedModel,
    shared: Callable[[], tuple[ExactCache, torch.Tensor]],
    text: list[int],
    method: Method,
    config: Config,
) -> dict[str, Any]:
    """Mean negative log-likelihood of the continuation of a text by one method."""
    plan = DecodePlan(
        prompt_tokens=config.prefix_tokens,
        steps=config.decoded_tokens,
        teacher_forced=True,
        local_tokens=config.local_tokens,
    )
    with open_cache(model, shared()[0], method, plan) as (opened, shares):
        loss = continuation_loss(model, opened, text[config.prefix_tokens :], one_by_one=method.is_shadowkv)
        return {
            "method": method.name,
            "fraction": method.fraction,
            "loss": loss,
            "attended": shares().attended,
            "scored": shares().scored,
        }


def continuation_loss(model: PreTrainedModel, opened: Cache, continuation: list[int], *, one_by_one: bool) -> float:
    """Mean loss of each token of `continuation` but the first, given those before it.

    The baselines take the block at once, each token under a mask of its own, which is the same computation
    as token by token (a test compares the two).
    """
    if one_by_one:
        logits = torch.stack([feed(model, opened, [token]) for token in continuation[:-1]])
    else:
        ids = torch.tensor([continuation[:-1]], device=model.device)
        logits = model(ids, past_key_values=opened, use_cache=True).logits[0]
    targets = torch.tensor(continuation[1:], device=logits.device)
    return float(F.cross_entropy(logits.float(), targets))


def summarize(results: list[dict[str, Any]], methods: list[Method]) -> list[Row]:
    """One row per method: perplexity over all texts, and its ratio to full attention's."""
    rows: list[Row] = []
    full_loss = 0.0
    for method in methods:
        of_row = [
            result for result in results if (result["method"], result["fraction"]) == (method.name, method.fraction)
        ]
        loss = fmean(result["loss"] for result in of_row)
        full_loss = loss if method.name == FULL_ATTENTION else full_loss
        rows.append(
            {
                "method": method.name,
                "fraction": method.fraction,
                "attended": fmean(result["attended"] for result in of_row),
                "scored": fmean(result["scored"] for result in of_row),
                "perplexity": math.exp(loss),
                "ratio": math.exp(loss - full_loss),
                "texts": len(of_row),
            }
        )
    return rows


TABLE = Table(
    name="perplexity",
    title="Perplexity of 256 decoded tokens after 4,000",
    about="SmolLM2-135M-Instruct (real weights, fp32), teacher-forced decoding of 256 tokens after an exact prefill of "
    "4,000 tokens of the Python language reference or of docstrings of the standard library; exp of the mean loss over "
    "all texts. The attended share counts every token a decoded token attends to, "
    "mean over layers, KV heads and steps. ShadowKV scores more keys than it attends to (3 candidates to a selected "
    "token); as published it attends to all of them and its basis is not weighted by the queries. Generated tokens "
    "are compressed in segments of 64 to 512, so long that the uncompressed ones take at most a quarter of the budget.",
    configs={"cpu": Config(), "cuda": Config()},
    quick=lambda config: replace(config, num_texts=2, decoded_tokens=64),
    columns=(
        Column(key="method", heading="method"),
        Column(key="fraction", heading="budget", unit="%"),
        Column(key="attended", heading="attended", unit="%"),
        Column(key="scored", heading="keys scored", unit="%"),
        Column(key="perplexity", heading="perplexity", digits=3),
        Column(key="ratio", heading="ratio to full attention", digits=4),
        Column(key="texts", heading="texts"),
    ),
    targets=tuple(
        Target(
            text=f"{method}, attended fraction 1/8: perplexity relative to full attention",
            row={"method": method, "fraction": 1 / 8},
            column="ratio",
            at_most=1.02,
        )
        for method in ("ShadowKV rank 64",)
    ),
    run=run,
)
