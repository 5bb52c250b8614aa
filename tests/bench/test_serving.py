"""What the serving table computes from runs, and the memory it predicts."""

import pytest

from bench.serving_load import CLOSE_LOGITS, Ask, Run, compare, random_asks, run_one_by_one, run_together
from bench.serving_memory import ENGINE, STOCK, check_accounting, memory_rows
from bench.session import Session
from bench.tables.serving import DOCUMENT, GENERATE, GENERATE_BATCH, SEPARATE, SHARED, THROUGHPUT, add_speedups
from longshadow import LLM, SamplingParams
from longshadow.engine.runtime import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprob
from tests.engine.runtime.engines import engine


def output(tokens: list[int], gaps: list[float] | None = None, *, cancelled: bool = False) -> RequestOutput:
    logprobs = None
    if gaps is not None:
        logprobs = [
            TokenLogprob(token_id=token, logprob=-1.0, rank=1, token="", top=((token, "", -1.0), (0, "", -1.0 - gap)))
            for token, gap in zip(tokens, gaps, strict=True)
        ]
    completion = CompletionOutput(
        index=0,
        text="",
        token_ids=tokens,
        logprobs=logprobs,
        finish_reason="cancelled" if cancelled else "length",
        stop_reason=None,
    )
    metrics = RequestMetrics(arrival=0.0, first_token=None, finished=None, queue_seconds=None)
    return RequestOutput(
        request_id="", prompt_token_ids=[], outputs=[completion], finished=True, num_cached_tokens=0, metrics=metrics
    )


def runs(*outputs: RequestOutput) -> Run:
    return Run(outputs=list(outputs), seconds=1.0)


def test_only_close_logits_excuse_a_difference() -> None:
    alone = runs(output([1, 2, 3], [1.0, 1e-5, 1.0]), output([4, 5], [1.0, 1.0]))
    assert compare(alone, runs(output([1, 2, 3]), output([4, 5]))).num_diverged == 0
    fair = compare(alone, runs(output([1, 9, 9]), output([4, 5])))
    assert (fair.num_diverged, fair.is_fair) == (1, True) and fair.largest_gap == pytest.approx(1e-5)
    unfair = compare(alone, runs(output([1, 2, 9]), output([4, 5])))
    assert unfair.largest_gap > CLOSE_LOGITS and not unfair.is_fair


def test_a_cancelled_answer_may_be_short_and_no_other() -> None:
    alone = runs(output([1, 2, 3], [1.0, 1.0, 1.0]))
    assert compare(alone, runs(output([1, 2], cancelled=True))).is_fair
    assert not compare(alone, runs(output([1, 2]))).is_fair


def test_decoding_is_measured_while_all_decode() -> None:
    run = runs()
    run.events = [(1.0, 0, 1), (2.0, 0, 2), (3.0, 1, 1), (4.0, 0, 3), (5.0, 1, 2), (6.0, 0, 4), (9.0, 1, 3)]
    # From 3.0, when the second begins, to 6.0, when the first ends: two tokens of the first, one of the second.
    assert run.decode_tokens_per_s == pytest.approx(3 / 3.0)


def test_random_requests_repeat_and_keep_within_the_text() -> None:
    arguments = dict(count=12, shortest=5, longest=80, max_tokens=8, stops=[1])
    first, second = (random_asks(list(range(100)), **arguments, seed=3) for _ in range(2))  # type: ignore[arg-type]
    assert first == second
    assert {len(ask.prompt) for ask in first} >= {5, 80}
    assert any(ask.leaves_after for ask in random_asks(list(range(100)), **{**arguments, "count": 40}, seed=3))  # type: ignore[arg-type]


def test_runs_of_a_real_engine_agree() -> None:
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    asks = [Ask(prompt=list(range(1, length)), params=params) for length in (20, 90)]
    asks.append(Ask(prompt=[3, 4], params=SamplingParams(max_tokens=50, temperature=0), leaves_after=2))
    llm: LLM
    with engine() as llm:
        together = run_together(llm, asks)
        comparison = compare(run_one_by_one(llm, asks), together)
    assert (comparison.num_requests, comparison.num_diverged) == (3, 0)
    assert together.outputs[2].outputs[0].finish_reason == "cancelled"
    assert together.num_tokens >= 6 + 6 + 2


def test_speedups_are_against_the_baselines_of_the_part() -> None:
    rows = [
        {"part": THROUGHPUT, "method": GENERATE, "seconds": 8.0, "decode_tokens_per_s": 10.0},
        {"part": THROUGHPUT, "method": GENERATE_BATCH, "seconds": 4.0},
        {"part": THROUGHPUT, "method": "engine", "seconds": 2.0, "decode_tokens_per_s": 30.0},
        {"part": THROUGHPUT, "method": "did not run"},
        {"part": DOCUMENT, "method": SEPARATE, "seconds": 50.0},
        {"part": DOCUMENT, "method": SHARED, "seconds": 5.0},
    ]
    add_speedups(rows)
    assert (rows[2]["speedup"], rows[2]["speedup_batch"], rows[2]["decode_speedup"]) == (4.0, 2.0, 3.0)
    assert "speedup" not in rows[3]
    assert rows[5]["speedup"] == 10.0


def test_the_memory_that_is_promised() -> None:
    """The targets of the table: exact accounting is the same everywhere."""
    rows = {(row["method"], row["context"]): row for row in memory_rows((8192, 32_768, 131_072), 64 * 2**30)}
    assert rows[STOCK, 8192]["sequence_bytes"] == 2**30
    for context, least in ((8192, 4), (32_768, 8), (131_072, 10)):
        assert rows[ENGINE, context]["memory_ratio"] >= least


def test_the_accounting_is_that_of_real_sequences() -> None:
    assert check_accounting([512], Session()) == 0
