"""Records: the round trip, where they belong, and which of them are shown."""

import json
from dataclasses import replace

import pytest

from bench.record import Check, Record, Revision, newest_records, read_records


def make_record(**changes) -> Record:
    record = Record(
        table="example",
        device="cpu",
        config={"length": 3, "fractions": [0.125, 0.0625]},
        rows=[
            {"method": "full", "median": 0.5, "speedup": 1.0},
            {"method": "fast", "median": 0.1, "speedup": 5.0},
        ],
        check=Check(passed=True, max_error=1e-6, text="outputs agree"),
        environment={"python": "3.11", "cpu": "some cpu", "threads": 2, "gpu": None, "torch": "2.13"},
        revision=Revision(commit="0123456789abcdef", branch="main", dirty=False),
        command="python -m bench run example",
        seed=0,
        quick=False,
        created_at="2026-11-21T10:00:00+00:00",
    )
    return replace(record, **changes)


def test_round_trip():
    record = make_record()
    assert Record.from_json(record.to_json()) == record


def test_another_schema_is_refused():
    data = json.loads(make_record().to_json()) | {"schema_version": 99}
    with pytest.raises(ValueError, match="schema"):
        Record.from_json(json.dumps(data))


def test_not_a_number_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        make_record(rows=[{"method": "full", "median": float("nan")}]).to_json()


def test_a_clean_complete_green_record_is_tracked(tmp_path):
    assert make_record().path(tmp_path) == tmp_path / "example" / "cpu" / "2026-11-21-0123456789.json"


@pytest.mark.parametrize(
    "changes",
    [
        {"quick": True},
        {"revision": Revision(commit="0123456789abcdef", branch="main", dirty=True)},
        {"check": Check(passed=False, max_error=1.0, text="outputs differ")},
    ],
    ids=["quick", "dirty", "red"],
)
def test_any_other_record_is_scratch(tmp_path, changes):
    assert make_record(**changes).path(tmp_path).relative_to(tmp_path).parts[0] == "scratch"


def test_reading_leaves_scratch_out(tmp_path):
    tracked, scratch = make_record(), make_record(quick=True)
    for record in (tracked, scratch):
        record.write(record.path(tmp_path))
    assert read_records(tmp_path) == [tracked]


def test_the_newest_record_per_table_and_device_is_shown():
    old, new = make_record(), make_record(created_at="2026-11-22T10:00:00+00:00")
    other_device = make_record(device="nvidia-h200")
    assert newest_records([new, other_device, old]) == [new, other_device]
