"""Many clients at once that leave, send nonsense, or send too much; `bench/tables/soak.py` is the long version."""

from bench.session import Session
from bench.table import load_table
from bench.tables import soak


def run(config):
    return load_table("soak").run(config, Session())


def test_everyone_gets_what_is_due_and_nothing_is_left():
    table = load_table("soak")
    config = table.quick(table.configs["cpu"])
    outcome = run(config)
    assert outcome.check.passed, outcome.check.text
    *kinds, everything = outcome.rows
    assert sum(row["requests"] for row in kinds) == everything["requests"] == config.requests
    assert everything["answered"] >= round(config.requests * 0.7)
    assert next(row for row in kinds if row["kind"] == soak.OVERSIZED)["refused"] == round(config.requests * 0.05)
    assert outcome.rows[0].keys() <= {column.key for column in table.columns}


def test_what_is_left_over_turns_the_check_red(monkeypatch):
    monkeypatch.setattr(soak, "PATIENCE", 0.5)
    release = soak.LLM.statistics
    calls = []

    def leaking(llm):
        calls.append(release(llm))
        return calls[0] if len(calls) == 1 else soak.replace(calls[-1], device_bytes=calls[-1].device_bytes + 7)

    monkeypatch.setattr(soak.LLM, "statistics", leaking)
    outcome = run(soak.Config(requests=4, clients=2, document_tokens=1100, prompt_tokens=20, answer_tokens=2))
    assert not outcome.check.passed
    assert outcome.check.text == "left over: 7 device bytes"


def test_a_wrong_status_turns_the_check_red(monkeypatch):
    monkeypatch.setitem(soak.EXPECTED, soak.WHOLE, {418})
    outcome = run(soak.Config(requests=4, clients=2, document_tokens=1100, prompt_tokens=20, answer_tokens=2))
    assert not outcome.check.passed
    assert "a whole request got 200" in outcome.check.text
