"""Many questions on one document: as separate prompts, with shared heads, and on a document that was read once."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.prose import passages
from bench.record import Row
from bench.serving_load import Ask, Run, compare, run_one_by_one, run_together
from bench.serving_setting import Config, divergence, engine, greedy, text_tokens, unit, warm_up
from bench.session import Session
from longshadow import LLM, SamplingParams, ShadowKVConfig
from longshadow.models import LoadedModel

DOCUMENT, LOADING = "8 questions on one document", "a saved document"
SEPARATE, HEADS, SHARED = "8 separate prompts", "8 prompts, prefix cache", "one document"
READING, LOADED = "read", "loaded"


def document_units(loaded: LoadedModel, config: Config, session: Session) -> list[dict[str, Any]]:
    """Questions on one document: as separate prompts, with the prefix cache, and on a document that was read once."""
    shadowkv = ShadowKVConfig(budget_tokens=config.budget_tokens)
    document = passages(text_tokens(loaded), count=1, length=config.document_tokens)[0]
    questions = [
        loaded.tokenizer(f"\n\nQuestion {number}: what does the text say about {topic}?\nAnswer:").input_ids
        for number, topic in enumerate(("names", "classes", "loops", "errors", "modules", "calls", "scopes", "types"))
    ][: config.num_questions]
    params = greedy(config.question_tokens)
    prompts = [Ask(prompt=document + question, params=params) for question in questions]

    def row(name: str, seconds: float, num_tokens: int) -> Row:
        return {
            "part": DOCUMENT,
            "method": name,
            "context": config.document_tokens,
            "seconds": seconds,
            "tokens_per_s": num_tokens / seconds,
        }

    def of_prompts(name: str) -> dict[str, Any]:
        session.progress(f"{len(questions)} questions: {name}")
        with engine(loaded, shadowkv, max_num_seqs=config.num_questions, prefix_cache=name == HEADS) as llm:
            warm_up(llm)
            done = run_together(llm, prompts)
            if name == SEPARATE:
                return unit([row(name, done.seconds, done.num_tokens)])
            session.progress(f"{len(questions)} questions: one by one, for the comparison")
        with engine(loaded, shadowkv, prefix_cache=False) as llm:
            comparison = compare(run_one_by_one(llm, prompts), done)
        return unit([row(name, done.seconds, done.num_tokens) | divergence(comparison)], comparison)

    def of_document() -> dict[str, Any]:
        session.progress(f"{len(questions)} questions: {SHARED}")
        with engine(loaded, shadowkv, max_num_seqs=config.num_questions, prefix_cache=False) as llm:
            warm_up(llm)
            started = time.perf_counter()
            read = llm.add_document(document)
            reading = time.perf_counter() - started
            asks = [Ask(prompt=question, params=params) for question in questions]
            done = run_together(llm, asks, document=read)
            expected = [llm.generate([ask.prompt], replace(params, logprobs=2), document=read)[0] for ask in asks]
            comparison = compare(Run(outputs=expected, seconds=0.0), done)
            loading, same = save_and_load(llm, read, questions[0], params)
        rows = [
            row(SHARED, reading + done.seconds, done.num_tokens) | divergence(comparison),
            {"part": LOADING, "method": READING, "context": config.document_tokens, "seconds": reading},
            {"part": LOADING, "method": LOADED, "context": config.document_tokens, "seconds": loading},
        ]
        return unit(rows, comparison, passed=same)

    units = [session.unit(f"document: {name}", lambda name=name: of_prompts(name)) for name in (SEPARATE, HEADS)]
    return [*units, session.unit(f"document: {SHARED}", of_document)]


def save_and_load(llm: LLM, document: Any, question: list[int], params: SamplingParams) -> tuple[float, bool]:
    """Seconds to load a document that was saved, and whether it answers as before."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "document.safetensors"
        document.save(path)
        started = time.perf_counter()
        loaded = llm.load_document(path)
        seconds = time.perf_counter() - started
    answers = [llm.generate([question], params, document=one)[0].outputs[0].token_ids for one in (document, loaded)]
    return seconds, answers[0] == answers[1]
