"""What the parts of the table `serving` share: sizes, engines, and what is stored of a finished piece of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.prose import language_reference
from bench.record import Row
from bench.serving_load import Comparison
from longshadow import LLM, SamplingParams, ShadowKVConfig
from longshadow.models import LoadedModel

ENGINE, ENGINE_SPARSE = "engine", "engine, compressed"


@dataclass(frozen=True, kw_only=True)
class Config:
    """SmolLM2-135M-Instruct in fp32.

    `exact_tokens`: contexts up to this stay exact in the throughput rows, because rebuilding keys of short contexts
    costs a CPU more than attending to them; one row is without it.
    """

    num_requests: int = 8
    prompt_tokens: int = 2000
    new_tokens: int = 256
    exact_tokens: int = 4096
    document_tokens: int = 6000
    num_questions: int = 8
    question_tokens: int = 64
    num_needles: int = 20
    needle_tokens: int = 4000
    num_random: int = 32
    shortest: int = 50
    longest: int = 6000
    random_tokens: int = 64
    budget_tokens: int = 256
    memory_contexts: tuple[int, ...] = (8192, 32_768, 131_072)
    checked_contexts: tuple[int, ...] = (8192,)
    device_gib: int = 64
    threads: int = 2


def unit(rows: list[Row], comparison: Comparison | None = None, *, passed: bool = True) -> dict[str, Any]:
    """What is stored of a finished piece of work."""
    return {
        "rows": rows,
        "compared": 0 if comparison is None else comparison.num_requests,
        "diverged": 0 if comparison is None else comparison.num_diverged,
        "gap": None if comparison is None else min(comparison.largest_gap, 1e9),
        "passed": passed,
    }


def divergence(comparison: Comparison) -> Row:
    """The columns of a comparison."""
    return {"diverged": comparison.num_diverged, "of": comparison.num_requests}


@contextmanager
def engine(loaded: LoadedModel, shadowkv: ShadowKVConfig, **options: Any) -> Iterator[LLM]:
    """An engine over the table's model."""
    with LLM(loaded.model, tokenizer=loaded.tokenizer, shadowkv=shadowkv, **options) as llm:
        yield llm


def warm_up(llm: LLM) -> None:
    """The first forwards of a process are slower."""
    llm.generate([[1, 2, 3] * 30], greedy(4))


def greedy(max_tokens: int) -> SamplingParams:
    """Exactly so many tokens."""
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def text_tokens(loaded: LoadedModel) -> list[int]:
    """The language reference."""
    tokens: list[int] = loaded.tokenizer(language_reference()).input_ids
    return tokens
