"""The tables of the decode step on a CPU at toy sizes: reference operators, ordinary launches in place of graphs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import ceilings, synthetic_decoding
from bench.decoding_check import check_steps
from bench.session import Session, UnitStore
from bench.synthetic import ModelShape, num_threads
from bench.synthetic_decoding import expect_captured
from bench.table import load_table
from bench.tables import decode_gpu, ops_gpu, prefill_gpu

TINY = ModelShape(
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=32,
    hidden_size=64,
    intermediate_size=64,
    vocab_size=96,
    rope_theta=10_000.0,
)
CEILINGS = ceilings.CeilingSizes(num_bytes=2**16, side=32, num_launches=2)


@pytest.fixture(autouse=True)
def _one_thread():
    with num_threads(1):
        yield


def run(name, config, **session):
    table = load_table(name)
    outcome = table.run(config, Session(**session))
    columns = {column.key for column in table.columns}
    assert all(row.keys() - columns <= {"flops"} for row in outcome.rows)
    return outcome


@pytest.fixture
def ops_config():
    table = load_table("ops_gpu")
    config = table.quick(table.configs["cuda"])
    changes = {**config.changes, "context_tokens": 1024, "batch_size": 1, "num_kv_heads": 2, "head_dim": 32, "rank": 16}
    return replace(config, backends=("reference",), ceilings=CEILINGS, changes=changes, repeats=1, reference_repeats=1)


def test_ops_gpu(ops_config):
    outcome = run("ops_gpu", ops_config)
    assert outcome.check.passed, outcome.check.text
    by_operator = {}
    for row in outcome.rows:
        by_operator.setdefault(row["operator"], []).append(row)
    assert by_operator.keys() - {"ceiling"} == ops_gpu.operator_modules().keys()
    assert len(by_operator["ceiling"]) == 5
    assert [row.get("method") for row in by_operator["sparse_attention"]] == ["reference", ops_gpu.SDPA]
    assert [row.get("method") for row in by_operator["top_chunks"]] == ["reference", ops_gpu.TOPK]
    for row in outcome.rows:
        if row["operator"] != "ceiling":
            assert row["share"] > 0 and row["launches"] > 0 and row["bytes"] > 0


def test_a_wrong_operator_turns_the_check_red(ops_config, monkeypatch):
    choose = ops_gpu.choose_operators

    def wrong(*arguments):
        chosen = choose(*arguments)
        return replace(chosen, score_chunks=lambda *given: given[-2].fill_(0.5))

    monkeypatch.setattr(ops_gpu, "choose_operators", wrong)
    modules = ops_gpu.operator_modules()
    monkeypatch.setattr(ops_gpu, "operator_modules", lambda: {"score_chunks": modules["score_chunks"]})
    outcome = run("ops_gpu", ops_config)
    assert not outcome.check.passed and "score_chunks" in outcome.check.text


def test_cases_of_the_targets_exist():
    named = {(name, case.name) for name, module in ops_gpu.operator_modules().items() for case in module.cases()}
    for target in load_table("ops_gpu").targets:
        assert (target.row["operator"], target.row["case"]) in named


def test_the_floor_is_the_slowest_ceiling():
    known = ceilings.Ceilings(copy=100.0, matmul=10.0, link=5.0, launch=1.0)
    assert known.floor(num_bytes=200, flops=5, over_link=False) == 2
    assert known.floor(num_bytes=200, flops=50, over_link=False) == 5
    assert known.floor(num_bytes=200, flops=5, over_link=True) == 40


@pytest.fixture
def decode_config(monkeypatch):
    monkeypatch.setitem(decode_gpu.SHAPES, "tiny", TINY)
    return decode_gpu.Config(
        shape="tiny",
        layers=2,
        contexts=(4096,),
        batch_sizes=(1, 2, 8),
        steps=2,
        blocks=2,
        host_bytes=2**20,
        device_bytes=8 * 2**20,
        checked_context=4096,
        dtype="float32",
        tolerance=1e-4,
        backend="reference",
    )


def test_decode_gpu(decode_config):
    outcome = run("decode_gpu", decode_config)
    assert outcome.check.passed, outcome.check.text
    methods = {row["method"] for row in outcome.rows}
    assert methods == {"full attention, SDPA", *(f"ShadowKV, {place}" for place in decode_config.placements)}
    for method in methods:
        rows = [row for row in outcome.rows if row["method"] == method]
        largest, *smaller = rows
        assert largest["size"] == "largest" and [row["batch"] for row in smaller] == [
            size for size in (8, 2, 1) if size < largest["batch"]
        ]
        if method.startswith("ShadowKV"):
            assert all(0.3 < row["hit_rate"] < 1 for row in rows)
            assert all(("host" in row) == ("host" in method) for row in rows)
    full = [row for row in outcome.rows if row["method"].startswith("full")]
    assert max(row["speedup_best"] for row in full) == 1 and all(row["speedup_same"] == 1 for row in full)


def test_finished_batches_are_taken_over(decode_config, tmp_path):
    config = replace(decode_config, batch_sizes=(1,), placements=decode_config.placements[-1:])
    first, second = (run("decode_gpu", config, store=UnitStore(tmp_path / "units.jsonl", "key")) for _ in range(2))
    assert first == second


def test_a_wrong_decoding_operator_turns_the_check_red(decode_config, monkeypatch):
    choose, calls = synthetic_decoding.choose_operators, []

    def wrong(*arguments):
        chosen = choose(*arguments)
        calls.append(arguments)
        # The first side of each pair only: the second is what it is compared with.
        return replace(chosen, fetch_values=lambda *given: None) if len(calls) % 2 else chosen

    monkeypatch.setattr(synthetic_decoding, "choose_operators", wrong)
    setting = synthetic_decoding.Setting(
        shape=TINY,
        traces=decode_gpu.Traces.load(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        seed=0,
        host_bytes=2**30,
        backend="reference",
    )
    with torch.no_grad():
        assert not check_steps(setting, 4096, decode_config.placements[:1], 1e-4).passed


def test_prefill_gpu(monkeypatch):
    monkeypatch.setitem(prefill_gpu.SHAPES, "tiny", replace(TINY, num_kv_heads=4))
    config = prefill_gpu.Config(shape="tiny", contexts=(600,), repeats=1, dtype="float32", tolerance=1e-3)
    outcome = run("prefill_gpu", config)
    assert outcome.check.passed, outcome.check.text
    layer, *parts = outcome.rows
    assert layer["part"] == prefill_gpu.LAYER and "share" not in layer
    assert [row["share"] for row in parts] == [pytest.approx(row["median"] / layer["median"]) for row in parts]
    assert all(row["model"] == 2 * row["median"] for row in outcome.rows)


def test_gpu_tables_have_no_cpu_configuration():
    for name in ("ops_gpu", "decode_gpu", "prefill_gpu"):
        table = load_table(name)
        assert set(table.configs) == {"cuda"} and table.quick(table.configs["cuda"]) != table.configs["cuda"]


def test_a_step_that_was_not_captured_is_not_timed():
    on_gpu, on_cpu = (SimpleNamespace(device=torch.device(name)) for name in ("cuda", "cpu"))
    captured, failed = SimpleNamespace(num_graphs=1), SimpleNamespace(num_graphs=0, failure=torch.OutOfMemoryError())
    expect_captured(captured, on_gpu)
    expect_captured(failed, on_cpu)
    with pytest.raises(torch.OutOfMemoryError):
        expect_captured(failed, on_gpu)
    with pytest.raises(RuntimeError, match="not captured"):
        expect_captured(SimpleNamespace(num_graphs=0, failure=None), on_gpu)
