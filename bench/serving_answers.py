"""Whether the engine answers as it should: needles through documents, and requests together as each alone."""

from __future__ import annotations

from typing import Any

from bench.needles import ANSWER_TOKENS, make_needles
from bench.record import Row
from bench.serving_load import compare, random_asks, run_one_by_one, run_together
from bench.serving_setting import ENGINE_SPARSE, Config, divergence, engine, greedy, text_tokens, unit
from bench.session import Session
from longshadow import ShadowKVConfig
from longshadow.models import LoadedModel

NEEDLES, EQUALITY = "20 needles", "32 requests, random arrivals"
IN_PROMPT, IN_DOCUMENT = "document in the prompt", "document read before"


def needle_units(loaded: LoadedModel, config: Config, session: Session) -> list[dict[str, Any]]:
    """Hidden numbers, asked for in the prompt and through a document that was read before."""
    needles = make_needles(
        loaded.tokenizer, count=config.num_needles, context_tokens=config.needle_tokens, num_keys=1, seed=session.seed
    )
    params = greedy(ANSWER_TOKENS)

    def ask(index: int) -> list[bool]:
        session.progress(f"needle {index + 1} of {len(needles)}")
        needle = needles[index]
        with engine(loaded, ShadowKVConfig(budget_tokens=config.budget_tokens), prefix_cache=False) as llm:
            whole = llm.generate([needle.document + needle.question], params)[0]
            document = llm.add_document(needle.document)
            later = llm.generate([needle.question], params, document=document)[0]
        return [needle.number in output.outputs[0].text for output in (whole, later)]

    found = [session.unit(f"needle {index}", lambda index=index: ask(index)) for index in range(len(needles))]
    counts = [sum(one[way] for one in found) for way in range(2)]
    rows: list[Row] = [
        {
            "part": NEEDLES,
            "method": name,
            "context": config.needle_tokens,
            "found": count,
            "of": len(needles),
            "beyond_prompt": count - counts[0],
        }
        for name, count in zip((IN_PROMPT, IN_DOCUMENT), counts, strict=True)
    ]
    return [unit(rows)]


def equality_units(loaded: LoadedModel, config: Config, session: Session) -> list[dict[str, Any]]:
    """Requests that come and go at random, against each of them alone."""
    tokens = text_tokens(loaded)
    stops = loaded.tokenizer("\n", add_special_tokens=False).input_ids
    asks = random_asks(
        tokens,
        count=config.num_random,
        shortest=config.shortest,
        longest=config.longest,
        max_tokens=config.random_tokens,
        stops=stops,
        seed=session.seed,
    )

    def measure() -> dict[str, Any]:
        session.progress(f"{len(asks)} random requests, together")
        shadowkv = ShadowKVConfig(budget_tokens=config.budget_tokens)
        with engine(loaded, shadowkv) as llm:
            together = run_together(llm, asks)
            waits = [output.metrics.queue_seconds or 0.0 for output in together.outputs]
        with engine(loaded, shadowkv, prefix_cache=False) as llm:
            alone = run_one_by_one(
                llm, asks, progress=lambda done: session.progress(f"{len(asks)} random requests, {done} one by one")
            )
        comparison = compare(alone, together)
        row: Row = {
            "part": EQUALITY,
            "method": ENGINE_SPARSE,
            "context": config.longest,
            "seconds": together.seconds,
            "worst_wait": max(waits),
        }
        return unit([row | divergence(comparison)], comparison)

    return [session.unit("equality", measure)]
