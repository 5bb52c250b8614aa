"""The engine: many requests at once, one document for many questions, and how many sequences fit."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.needles import ANSWER_TOKENS, make_needles
from bench.prose import language_reference, passages
from bench.record import Check, Row
from bench.serving_load import CLOSE_LOGITS, Ask, Comparison, Run, compare, random_asks, run_one_by_one, run_together
from bench.serving_memory import check_accounting, memory_rows
from bench.session import Session
from bench.synthetic import num_threads
from bench.table import Column, Outcome, Table, Target
from longshadow import LLM, SamplingParams, ShadowKVConfig
from longshadow.models import LoadedModel, load_model
from longshadow.streaming import MeasuringStreamer

THROUGHPUT, DOCUMENT, LOADING = "8 requests", "8 questions on one document", "a saved document"
NEEDLES, EQUALITY, MEMORY = "20 needles", "32 requests, random arrivals", "sequences at once"
GENERATE, GENERATE_BATCH = "generate, one at a time", "generate_batch"
ENGINE, ENGINE_SPARSE = "engine", "engine, compressed"
SEPARATE, HEADS, SHARED = "8 separate prompts", "8 prompts, prefix cache", "one document"
READING, LOADED = "read", "loaded"
# Of generate_batch: its own page, and the engine's budget of a step.
PAGE_TOKENS, BATCH_TOKENS = 256, 512
IN_PROMPT, IN_DOCUMENT = "document in the prompt", "document read before"


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


def unit(rows: list[Row], comparison: Comparison | None = None, *, passed: bool = True) -> dict[str, Any]:
    """What is stored of a finished piece of work."""
    return {
        "rows": rows,
        "compared": 0 if comparison is None else comparison.num_requests,
        "diverged": 0 if comparison is None else comparison.num_diverged,
        "gap": None if comparison is None else min(comparison.largest_gap, 1e9),
        "passed": passed,
    }


@contextmanager
def engine(loaded: LoadedModel, shadowkv: ShadowKVConfig, **options: Any) -> Iterator[LLM]:
    """An engine over the table's model."""
    with LLM(loaded.model, tokenizer=loaded.tokenizer, shadowkv=shadowkv, **options) as llm:
        yield llm


def greedy(max_tokens: int) -> SamplingParams:
    """Exactly so many tokens."""
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def text_tokens(loaded: LoadedModel) -> list[int]:
    """The language reference."""
    tokens: list[int] = loaded.tokenizer(language_reference()).input_ids
    return tokens


def throughput_units(loaded: LoadedModel, config: Config, session: Session) -> list[dict[str, Any]]:
    """Concurrent requests of equal length by four methods; every engine is compared with itself, one by one."""
    windows = passages(text_tokens(loaded), count=config.num_requests, length=config.prompt_tokens)
    asks = [Ask(prompt=prompt, params=greedy(config.new_tokens)) for prompt in windows]
    ways = {
        ENGINE: ShadowKVConfig(dense_threshold=config.exact_tokens),
        ENGINE_SPARSE: ShadowKVConfig(budget_tokens=config.budget_tokens),
    }

    def progress(name: str) -> None:
        session.progress(f"{config.num_requests} requests of {config.prompt_tokens:,} tokens: {name}")

    def of_engine(name: str) -> dict[str, Any]:
        progress(name)
        with engine(loaded, ways[name], max_num_seqs=config.num_requests, prefix_cache=False) as llm:
            warm_up(llm)
            together = run_together(llm, asks)
            alone = run_one_by_one(llm, asks, progress=lambda done: progress(f"{name}, {done} one by one"))
        comparison = compare(alone, together)
        row = throughput_row(name, together.num_tokens, together.seconds, together.decode_tokens_per_s, config)
        return unit([row | divergence(comparison)], comparison)

    units = [session.unit(f"throughput: {GENERATE}", lambda: one_at_a_time(loaded, asks, config, progress))]
    units.append(session.unit(f"throughput: {GENERATE_BATCH}", lambda: generate_batch(loaded, asks, config, progress)))
    for name in ways:
        units.append(session.unit(f"throughput: {name}", lambda name=name: of_engine(name)))
    return units


def warm_up(llm: LLM) -> None:
    """The first forwards of a process are slower."""
    llm.generate([[1, 2, 3] * 30], greedy(4))


def one_at_a_time(loaded: LoadedModel, asks: list[Ask], config: Config, progress: Any) -> dict[str, Any]:
    """transformers' own `generate`, SDPA, one request after the other."""
    model: Any = loaded.model
    seconds, decode_seconds = 0.0, 0.0
    for index, ask in enumerate(asks):
        progress(f"{GENERATE}, {index}")
        streamer = MeasuringStreamer(loaded.tokenizer, lambda text: None)
        started = time.perf_counter()
        model.generate(
            torch.tensor([ask.prompt]),
            attention_mask=torch.ones(1, len(ask.prompt), dtype=torch.long),
            max_new_tokens=config.new_tokens,
            min_new_tokens=config.new_tokens,
            do_sample=False,
            streamer=streamer,
        )
        seconds += time.perf_counter() - started
        assert streamer.tokens_per_second is not None
        decode_seconds += (config.new_tokens - 1) / streamer.tokens_per_second
    decoded = len(asks) * (config.new_tokens - 1) / decode_seconds
    return unit([throughput_row(GENERATE, len(asks) * config.new_tokens, seconds, decoded, config)])


def generate_batch(loaded: LoadedModel, asks: list[Ask], config: Config, progress: Any) -> dict[str, Any]:
    """transformers' continuous batching, where it runs on this device; a row without numbers says that it does not."""
    progress(GENERATE_BATCH)
    model: Any = loaded.model
    settings = GenerationConfig(
        max_new_tokens=config.new_tokens,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=loaded.tokenizer.pad_token_id or 0,
    )
    # Without sizes it takes most of the memory and pads its steps to that, which is many times slower.
    num_pages = -(-(config.prompt_tokens + config.new_tokens) // PAGE_TOKENS) + 1
    sizes = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS, num_blocks=len(asks) * num_pages, max_batch_tokens=BATCH_TOKENS
    )
    before = model.config._attn_implementation
    started = time.perf_counter()
    try:
        outputs = model.generate_batch(
            inputs=[ask.prompt for ask in asks],
            generation_config=settings,
            continuous_batching_config=sizes,
            progress_bar=False,
        )
    # Whatever it raises where it does not run: the row says so.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:80]
        return unit([{"part": THROUGHPUT, "method": f"{GENERATE_BATCH} (does not run here: {reason})"}])
    finally:
        model.set_attn_implementation(before)
    seconds = time.perf_counter() - started
    num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
    if num_tokens != len(asks) * config.new_tokens:
        return unit([{"part": THROUGHPUT, "method": f"{GENERATE_BATCH} (gave {num_tokens} tokens)"}])
    return unit([throughput_row(GENERATE_BATCH, num_tokens, seconds, None, config)])


def throughput_row(name: str, num_tokens: int, seconds: float, decode: float | None, config: Config) -> Row:
    """Output tokens per second, prompts included in the time, and of decoding alone."""
    row: Row = {"part": THROUGHPUT, "method": name, "context": config.prompt_tokens, "seconds": seconds}
    row["tokens_per_s"] = num_tokens / seconds
    if decode is not None:
        row["decode_tokens_per_s"] = decode
    return row


def divergence(comparison: Comparison) -> Row:
    """The columns of a comparison."""
    return {"diverged": comparison.num_diverged, "of": comparison.num_requests}


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
    "engine's own accounting: 256 of their tokens generated, int8 factors, 512 resident tokens, values in host "
    "memory.",
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
