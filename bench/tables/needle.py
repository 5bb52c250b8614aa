"""Needles found by ShadowKV and by other ways to spend the same number of attended tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch

from bench.baselines.exact_cache import ExactCache
from bench.methods import FULL_ATTENTION, DecodePlan, Method, all_methods, open_cache
from bench.needles import ANSWER_TOKENS, Needle, make_needles
from bench.quality import check_full_size, decode_greedily, feed, prefill
from bench.record import Row
from bench.session import Session
from bench.table import Column, Outcome, Table, Target
from longshadow.models import LoadedModel, load_model

ONE_KEY = "question in the prompt"
SECOND_TURN = "question in a second turn"
SIX_KEYS = "six keys, one asked"


@dataclass(frozen=True, kw_only=True)
class Config:
    """`num_needles` (with several keys `num_several`) at each attended fraction and ShadowKV rank (of 192)."""

    num_needles: int = 20
    num_several: int = 20
    context_tokens: int = 4000
    num_keys: int = 6
    fractions: tuple[float, ...] = (1 / 8, 1 / 16, 1 / 32)
    ranks: tuple[int, ...] = (64, 32)


def run(config: Config, session: Session) -> Outcome:
    """Every needle is one unit: a shared exact prefill, then each method decodes the answer."""
    loaded = load_model("demo", dtype=torch.float32, device=session.device)
    methods = all_methods(config.fractions, config.ranks)
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for num_keys in (1, config.num_keys):
            chosen = methods if num_keys == 1 else all_methods(config.fractions[:1], config.ranks[:1])
            needles = make_needles(
                loaded.tokenizer,
                count=config.num_needles if num_keys == 1 else config.num_several,
                context_tokens=config.context_tokens,
                num_keys=num_keys,
                seed=session.seed,
            )
            if num_keys == 1:
                check = check_full_size(loaded.model, needles[0].document + needles[0].question, 28)
            for index, needle in enumerate(needles):
                session.progress(f"needle {index + 1} of {len(needles)}, {num_keys} keys")
                results += session.unit(
                    f"{num_keys} keys, needle {index}",
                    partial(ask, loaded, needle, chosen, several=num_keys > 1),
                )
    return Outcome(rows=summarize(results, methods), check=check)


def ask(loaded: LoadedModel, needle: Needle, methods: list[Method], *, several: bool) -> list[dict[str, Any]]:
    """Asks for one needle by every method, in the prompt and, with a single key, in a second turn too."""
    model = loaded.model
    document, _ = prefill(model, needle.document)
    prompt, logits = prefill(model, needle.question, document)
    asked = _ask_all(loaded, prompt, needle, methods, SIX_KEYS if several else ONE_KEY, logits)
    if not several:
        first_turn, _ = prefill(model, needle.first_turn, document)
        asked += _ask_all(loaded, first_turn, needle, methods, SECOND_TURN, None)
    return asked


def _ask_all(
    loaded: LoadedModel,
    cache: ExactCache,
    needle: Needle,
    methods: list[Method],
    scenario: str,
    logits: torch.Tensor | None,
) -> list[dict[str, Any]]:
    """`logits` None: the question comes as a second turn, after each method has compressed the first."""
    turn = needle.second_turn if logits is None else []
    plan = DecodePlan(prompt_tokens=cache.get_seq_length(), turn_tokens=len(turn), steps=ANSWER_TOKENS - 1)
    results = []
    for method in methods:
        with open_cache(loaded.model, cache, method, plan) as (opened, shares):
            start = feed(loaded.model, opened, turn) if logits is None else logits
            answer = decode_greedily(loaded.model, opened, start, steps=ANSWER_TOKENS, stop=None)
            results.append(
                {
                    "scenario": scenario,
                    "method": method.name,
                    "fraction": method.fraction,
                    "found": needle.number in loaded.tokenizer.decode(answer),
                    "attended": shares().attended,
                    "scored": shares().scored,
                }
            )
    return results


def summarize(results: list[dict[str, Any]], methods: list[Method]) -> list[Row]:
    """One row per scenario and method: needles found, beside what full attention finds."""
    rows: list[Row] = []
    for scenario in (ONE_KEY, SECOND_TURN, SIX_KEYS):
        full = 0
        for method in methods:
            of_row = [
                result
                for result in results
                if (result["scenario"], result["method"], result["fraction"])
                == (scenario, method.name, method.fraction)
            ]
            if not of_row:
                continue
            found = sum(result["found"] for result in of_row)
            full = found if method.name == FULL_ATTENTION else full
            rows.append(
                {
                    "scenario": scenario,
                    "method": method.name,
                    "fraction": method.fraction,
                    "attended": fmean(result["attended"] for result in of_row),
                    "scored": fmean(result["scored"] for result in of_row),
                    "found": found,
                    "of": len(of_row),
                    "beyond_full": found - full,
                }
            )
    return rows


def _target(scenario: str, method: str) -> Target:
    return Target(
        text=f"{method}, attended fraction 1/8, {scenario}: found beyond full attention",
        row={"scenario": scenario, "method": method, "fraction": 1 / 8},
        column="beyond_full",
        at_least=-1,
    )


TABLE = Table(
    name="needle",
    title="Needles found at 4,000 tokens",
    about="SmolLM2-135M-Instruct (real weights, fp32) is asked for a number hidden in chapters of the Python language "
    "reference, at evenly spread depths; greedy decoding. All methods continue the same exact prefill. The attended "
    "share counts every token a decoded token attends to (sink, outliers, selected, "
    "local and generated ones), mean over "
    "layers, KV heads and steps. ShadowKV scores more keys than it attends to (3 candidates to "
    "a selected token); "
    "as published it attends to all of them and its basis is not weighted by the queries. "
    "In a second turn the question's own tokens attend to everything, except for the "
    "evicting methods (SnapKV, StreamingLLM), whose cache has been cut at the end of the document.",
    configs={"cpu": Config(), "cuda": Config()},
    quick=lambda config: replace(config, num_needles=3, num_several=1),
    columns=(
        Column(key="scenario", heading="scenario"),
        Column(key="method", heading="method"),
        Column(key="fraction", heading="budget", unit="%"),
        Column(key="attended", heading="attended", unit="%"),
        Column(key="scored", heading="keys scored", unit="%"),
        Column(key="found", heading="found"),
        Column(key="of", heading="of"),
        Column(key="beyond_full", heading="beyond full attention"),
    ),
    targets=(
        _target(ONE_KEY, "ShadowKV rank 64"),
        _target(SECOND_TURN, "ShadowKV rank 64"),
    ),
    run=run,
)
