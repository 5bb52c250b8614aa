"""Units of an interrupted run, and the progress line."""

import io

import pytest

from bench.session import Session, UnitStore, unit_key


def test_an_interrupted_run_goes_on(tmp_path):
    path = tmp_path / "scratch" / "table.partial.jsonl"
    first = Session(store=UnitStore(path, "key"))
    assert first.unit("a", lambda: [1, 2]) == [1, 2]
    second = Session(store=UnitStore(path, "key"))
    assert second.unit("a", lambda: pytest.fail("measured again")) == [1, 2]
    assert second.unit("b", lambda: 3) == 3


def test_half_a_line_is_measured_again(tmp_path):
    path = tmp_path / "table.partial.jsonl"
    UnitStore(path, "key").put("a", 1)
    with path.open("a") as file:
        file.write('\n{"key": "key", "unit": "b", "va')
    store = UnitStore(path, "key")
    assert store.get("a") == 1 and store.get("b") is None
    store.put("c", 3)
    assert UnitStore(path, "key").get("c") == 3


def test_other_configurations_and_sources_do_not_mix(tmp_path):
    path = tmp_path / "table.partial.jsonl"
    UnitStore(path, "one").put("a", 1)
    other = UnitStore(path, "two")
    assert other.get("a") is None
    other.put("a", 2)
    other.clear()
    assert UnitStore(path, "one").get("a") == 1 and UnitStore(path, "two").get("a") is None
    assert unit_key({"n": 1}, "sources", "cpu") != unit_key({"n": 1}, "changed", "cpu")


def test_clearing_the_last_units_removes_the_file(tmp_path):
    store = UnitStore(tmp_path / "table.partial.jsonl", "key")
    store.put("a", 1)
    store.clear()
    assert not store.path.exists()


def test_progress_is_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    Session(stream=stream).progress("half way")
    assert stream.getvalue().endswith("half way\n")
