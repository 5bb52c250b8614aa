"""The speed and memory tables at toy sizes, and the prompts of the quality tables."""

from dataclasses import replace

import pytest
import torch

from bench import needles, prose
from bench.peak import PeakMemoryMeter
from bench.session import Session
from bench.table import load_table
from bench.tables import decode_attention, decode_end_to_end, dpo_step, memory
from tests.bench.test_methods import SHAPE


def run(name, config):
    table = load_table(name)
    outcome = table.run(config, Session())
    assert outcome.check.passed, outcome.check.text
    columns = {column.key for column in table.columns}
    assert all(row.keys() - columns <= {"flops", "part"} for row in outcome.rows)
    return outcome.rows


def test_decode_attention():
    context = decode_attention.Context(tokens=1024, selected_tokens=64, outlier_chunks=2)
    rows = run("decode_attention", decode_attention.Config(contexts=(context,), repeats=2, warmup=1))
    by_method = {row["method"]: row for row in rows}
    assert by_method["ShadowKV exact"]["hit_rate"] == by_method["ShadowKV low_rank"]["hit_rate"] == 0
    assert by_method["ShadowKV exact"]["bytes"] < by_method[decode_attention.SDPA]["bytes"]
    assert {"ShadowKV low_rank: score", "ShadowKV low_rank: rebuild keys"} <= by_method.keys()


def test_a_wrong_step_turns_the_check_red(monkeypatch):
    monkeypatch.setattr(decode_attention, "sdpa_attention", lambda tokens, query: torch.zeros_like(query))
    context = decode_attention.Context(tokens=512, selected_tokens=64, outlier_chunks=2)
    table = load_table("decode_attention")
    outcome = table.run(decode_attention.Config(contexts=(context,), repeats=1, warmup=0), Session())
    assert not outcome.check.passed


def test_memory():
    rows = run("memory", memory.Config(short_tokens=2048, long_tokens=3072, selected_tokens=64))
    full, plain, packed = (row["device"] for row in rows)
    # Factors of rank 160, landmarks of a chunk of 8, cos and sin shared by 32 layers; int8 with its scales.
    assert full == 4096
    assert plain == pytest.approx(2 * 160 + 2048 / 8 + 256 / 32)
    assert packed == pytest.approx((160 + 4) + (1024 + 8 * 4) / 8 + 256 / 32)


def test_decode_end_to_end(monkeypatch):
    monkeypatch.setattr(decode_end_to_end, "SHAPE", SHAPE)
    config = decode_end_to_end.Config(
        decode_context=2048, decode_steps=2, warmup=1, prefill_context=1280, prefill_repeats=1
    )
    rows = run("decode_end_to_end", config)
    decoding = {row["method"]: row for row in rows if row["part"] == "decode"}
    assert decoding["DynamicCache"]["speedup_dynamic"] == 1
    assert decoding["preallocated full cache"]["speedup_preallocated"] == 1
    assert 0 < decoding["ShadowKV"]["attended"] < 1
    [share] = [row["share"] for row in rows if "share" in row]
    assert share > 0


def test_dpo_step(monkeypatch):
    monkeypatch.setattr(dpo_step, "SHAPE", SHAPE)
    cells = (
        dpo_step.Cell(kind=dpo_step.PAIR, prompt=24, response=8),
        dpo_step.Cell(kind=dpo_step.GROUP, prompt=24, response=8),
    )
    rows = run("dpo_step", dpo_step.Config(cells=cells, repeats=1))
    ratios = [row["ratio"] for row in rows if row["method"] == dpo_step.SHARED]
    assert ratios == pytest.approx([64 / 40, 256 / 88])
    assert all(row["speedup"] == 1 for row in rows if row["method"] == dpo_step.PADDED)


def test_a_wrong_shared_step_turns_the_check_red(monkeypatch):
    monkeypatch.setattr(dpo_step, "SHAPE", SHAPE)
    shared_step = dpo_step.shared_step

    def wrong(policy, *arguments):
        shared_step(policy, *arguments)
        policy.lm_head.weight.grad.mul_(1.01)

    monkeypatch.setattr(dpo_step, "shared_step", wrong)
    cells = (dpo_step.Cell(kind=dpo_step.PAIR, prompt=24, response=8),)
    outcome = load_table("dpo_step").run(dpo_step.Config(cells=cells, repeats=1), Session())
    assert not outcome.check.passed


def test_peak_memory_sees_what_was_freed_again():
    with PeakMemoryMeter("cpu") as meter:
        torch.ones(64 << 20, dtype=torch.uint8).sum()
    assert meter.bytes is None or meter.bytes > 32 << 20


def test_needles_are_spread_and_asked_for(smollm2):
    made = needles.make_needles(smollm2.tokenizer, count=4, context_tokens=1000, num_keys=3, seed=0)
    lengths = [len(needle.document) + len(needle.question) for needle in made]
    assert all(900 <= length <= 1000 for length in lengths)
    depths = []
    for needle in made:
        text = smollm2.tokenizer.decode(needle.document)
        assert text.count("The special magic number for") == 3
        depths.append(text.index(needle.number) / len(text))
        asked = smollm2.tokenizer.decode(needle.question)
        city = asked.split("magic number for ")[1].split("?")[0]
        assert f"for {city} is {needle.number}" in text
        assert smollm2.tokenizer.decode(needle.second_turn).endswith(f"The special magic number for {city} is")
    assert depths == sorted(depths) and depths[-1] - depths[0] > 0.5


def test_prose():
    assert len(prose.language_reference()) > 100_000 and len(prose.library_docstrings()) > 100_000
    assert prose.passages([*range(10)], count=3, length=4) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    with pytest.raises(ValueError, match="a passage needs 4"):
        prose.passages([1, 2], count=1, length=4)


def test_quick_tables_are_smaller():
    for name in ("needle", "perplexity"):
        table = load_table(name)
        config = table.configs["cpu"]
        assert table.quick(config) != config and replace(config) == config
