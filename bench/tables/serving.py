"""The engine: many requests at once, one document for many questions, and how many sequences fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from bench.record import Check, Row
from bench.serving_answers import IN_DOCUMENT, NEEDLES, equality_units, needle_units
from bench.serving_documents import DOCUMENT, LOADED, LOADING, READING, SEPARATE, SHARED, document_units
from bench.serving_load import CLOSE_LOGITS
from bench.serving_memory import PART as MEMORY
from bench.serving_memory import check_accounting, memory_rows
from bench.serving_setting import ENGINE, ENGINE_SPARSE, Config
from bench.serving_throughput import GENERATE, GENERATE_BATCH, THROUGHPUT, throughput_units
from bench.session import Session
from bench.synthetic import num_threads
from bench.table import Column, Outcome, Table, Target
from longshadow.models import load_model


def run(config: Config, session: Session) -> Outcome:
    """Every method of every part is a unit, and its own check is part of it."""
    units: list[dict[str, Any]] = []
    with num_threads(config.threads):
        loaded = load_model("demo", dtype=torch.float32, device=session.device)
        for measure in (throughput_units, document_units, needle_units, equality_units):
            units += measure(loaded, config, session)
    rows: list[Row] = [row for unit in units for row in unit["rows"]]
    session.progress("memory")
    error = check_accounting(config.checked_contexts, session)
    rows += memory_rows(config.memory_contexts, config.device_gib * 2**30)
    add_speedups(rows)
    gap = max((unit["gap"] for unit in units if unit["gap"] is not None), default=0.0)
    diverged = sum(unit["diverged"] for unit in units)
    compared = sum(unit["compared"] for unit in units)
    check = Check(
        passed=gap < CLOSE_LOGITS and error == 0 and all(unit["passed"] for unit in units),
        max_error=gap,
        text=f"of {compared} greedy answers compared with the same requests one by one {diverged} differ, from tokens "
        f"at which the two best logits differ by {gap:.1e} at most (allowed: below {CLOSE_LOGITS:.0e}); loaded "
        f"documents answer like saved ones; predicted bytes differ from those of real sequences by {error}",
    )
    return Outcome(rows=rows, check=check)


def add_speedups(rows: list[Row]) -> None:
    """Each part's times against its baseline's."""
    baselines = {THROUGHPUT: (GENERATE, GENERATE_BATCH), DOCUMENT: (SEPARATE,), LOADING: (READING,)}
    for part, names in baselines.items():
        of_part = {row["method"]: row for row in rows if row["part"] == part and "seconds" in row}
        for name, column in zip(names, ("speedup", "speedup_batch"), strict=False):
            for row in of_part.values():
                if name in of_part:
                    row[column] = of_part[name]["seconds"] / row["seconds"]
                    if column == "speedup" and "decode_tokens_per_s" in row:
                        row["decode_speedup"] = row["decode_tokens_per_s"] / of_part[name]["decode_tokens_per_s"]


def _target(text: str, part: str, method: str, column: str, least: float, **more: Any) -> Target:
    return Target(text=text, row={"part": part, "method": method, **more}, column=column, at_least=least)


TABLE: Table = Table(
    name="serving",
    title="The engine: throughput, documents, and sequences at once",
    about="SmolLM2-135M-Instruct (real weights, fp32), prompts from the Python language reference, greedy decoding, "
    "all methods on the same threads; transformers computes linear layers with PyTorch's default library (MKL), the "
    "engine with oneDNN, which is part of its speed-up. Times include reading the prompts; decoding alone is measured "
    "while all requests decode. In the throughput rows the engine keeps contexts up to 4,096 tokens exact, as a CPU "
    "is faster that way at 2,000; compressed, it attends to 256 selected tokens, as in the rows on documents. A "
    "document's time includes reading it once. Equality counts greedy answers that differ from those of the same "
    "request alone. Sequences at once are those that fit into 64 GiB of device memory at Llama-3.1-8B's shapes by the "
    "engine's own accounting, the batch in which they decode on a GPU included: 256 of their tokens generated, int8 "
    "factors, 512 resident tokens, values in host memory.",
    configs={"cpu": Config()},
    quick=lambda config: replace(
        config,
        num_requests=2,
        prompt_tokens=300,
        new_tokens=8,
        document_tokens=1500,
        num_questions=2,
        question_tokens=4,
        num_needles=1,
        needle_tokens=1500,
        num_random=4,
        longest=400,
        random_tokens=8,
        checked_contexts=(1024,),
        threads=1,
    ),
    columns=(
        Column(key="part", heading="part"),
        Column(key="method", heading="method"),
        Column(key="context", heading="tokens", unit="count"),
        Column(key="seconds", heading="time", unit="s"),
        Column(key="tokens_per_s", heading="output tokens/s", digits=1),
        Column(key="speedup", heading="× baseline", unit="x", speedup=True),
        Column(key="speedup_batch", heading="× generate_batch", unit="x", speedup=True),
        Column(key="decode_tokens_per_s", heading="decoding tokens/s", digits=1),
        Column(key="decode_speedup", heading="× decoding", unit="x", speedup=True),
        Column(key="found", heading="found"),
        Column(key="beyond_prompt", heading="more than in the prompt", unit="count"),
        Column(key="diverged", heading="answers that differ"),
        Column(key="of", heading="of"),
        Column(key="worst_wait", heading="longest wait", unit="s"),
        Column(key="sequence_bytes", heading="device bytes per sequence", unit="B"),
        Column(key="sequences", heading="sequences at once", unit="count"),
        Column(key="memory_ratio", heading="× stock cache", unit="x"),
    ),
    targets=(
        _target("engine against generate, one at a time", THROUGHPUT, ENGINE, "speedup", 1.8),
        _target("engine against generate_batch", THROUGHPUT, ENGINE, "speedup_batch", 1.0),
        _target("questions on one document against separate prompts", DOCUMENT, SHARED, "speedup", 5.0),
        _target("loading a document against reading it", LOADING, LOADED, "speedup", 20.0),
        _target(
            "needles found through a document, beyond those in the prompt", NEEDLES, IN_DOCUMENT, "beyond_prompt", 0
        ),
        *(
            _target(
                f"sequences of {context:,} tokens at once",
                MEMORY,
                ENGINE_SPARSE,
                "memory_ratio",
                least,
                context=context,
            )
            for context, least in ((8192, 4.0), (32_768, 8.0), (131_072, 10.0))
        ),
    ),
    run=run,
)
