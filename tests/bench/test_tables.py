"""The speed and memory tables at toy sizes, and the prompts of the quality tables."""

from dataclasses import replace

import pytest
import torch

from bench import needles, prose
from bench.peak import PeakMemoryMeter
from bench.session import Session
from bench.table import load_table
from bench.tables import (
    decode_attention,
    decode_end_to_end,
    dpo_lengths,
    dpo_step,
    dpo_step_gpu,
    memory,
    prefix_attention,
)
from bench.tables.dpo_lengths import PADDING_FREE, SHARED, TRL
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
    cells = (dpo_step.Cell(prompt=24, response=8), dpo_step.Cell(kind=dpo_step.GROUP, prompt=24, response=8))
    rows = run("dpo_step", dpo_step.Config(cells=cells, repeats=1))
    ratios = [row["ratio"] for row in rows if row["method"] == dpo_step.DROP_IN]
    assert ratios == pytest.approx([64 / 40, 256 / 88])
    assert all(row["speedup"] == 1 for row in rows if row["method"] == dpo_step.TRL)
    assert rows[1]["share"] > 0


def test_a_wrong_shared_step_turns_the_check_red(monkeypatch):
    monkeypatch.setattr(dpo_step, "SHAPE", SHAPE)
    shared_step = dpo_step.shared_step

    def wrong(trainer, batch):
        loss = shared_step(trainer, batch)
        trainer.model.lm_head.weight.grad.mul_(1.01)
        return loss

    monkeypatch.setattr(dpo_step, "shared_step", wrong)
    cells = (dpo_step.Cell(prompt=24, response=8), dpo_step.Cell(kind=dpo_step.GROUP, prompt=24, response=8))
    outcome = load_table("dpo_step").run(dpo_step.Config(cells=cells, repeats=1), Session())
    assert not outcome.check.passed


def test_dpo_lengths(monkeypatch):
    monkeypatch.setattr(dpo_lengths, "SHAPE", SHAPE)
    config = dpo_lengths.Config(data_sets=dpo_lengths.DATA_SETS[1:2], pairs=4, packing_tokens=600, repeats=1)
    by_method = {row["method"]: row for row in run("dpo_lengths", config)}
    padded, real, unique = (by_method[name]["tokens"] for name in (TRL, PADDING_FREE, SHARED))
    assert padded > 1.1 * real > 1.1 * unique and by_method[dpo_lengths.PACKED]["tokens"] == unique


def test_dpo_step_gpu(monkeypatch):
    monkeypatch.setitem(dpo_step_gpu.SHAPES, "smollm2-135m", SHAPE)
    config = replace(load_table("dpo_step_gpu").configs["cpu"], layers=1, repeats=1)
    rows = run("dpo_step_gpu", replace(config, cells=(dpo_step_gpu.Cell(pairs=2, prompt=24, response=8),)))
    assert [row["method"] for row in rows] == [dpo_step_gpu.PADDED, "share_prefixes, chains"]


def test_prefix_attention():
    config = load_table("prefix_attention").configs["cpu"]
    cells = (prefix_attention.Cell(prompts=2, prompt=24, rows=3, response=8),)
    rows = run("prefix_attention", replace(config, cells=cells, repeats=1))
    assert [row["method"] for row in rows] == [prefix_attention.PADDED, "dense", "chains"]
    # Of a tree: the causal prompt with the first answer, and two answers that see the prompt and themselves.
    assert rows[0]["ratio"] == pytest.approx(3 * 32 * 33 / (32 * 33 + 2 * (2 * 8 * 24 + 8 * 9)))


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
