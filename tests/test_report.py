"""The table at 80 columns, the object for programs, the share of equal tokens."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from longshadow.generation import Generation
from longshadow.report import Report, format_bytes

OURS = Generation(
    text="An answer",
    tokens=[1, 2, 3, 4],
    first_token_seconds=9.84,
    tokens_per_second=12.345,
    device_bytes=41_000_000,
    host_bytes=53_000_000,
    peak_bytes=99_000_000,
    full_cache_bytes=106_000_000,
    attended_fraction=0.1371,
    interrupted=False,
)
THEIRS = replace(OURS, tokens=[1, 9, 3], device_bytes=106_000_000, host_bytes=0, attended_fraction=1.0)


def make_report(ours: Generation, theirs: Generation | None) -> Report:
    return Report(
        model="demo",
        device="cpu",
        dtype="float32",
        prompt_tokens=4711,
        shadowkv=ours,
        full_attention=theirs,
    )


def rendered(report: Report) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=80).print(report.to_table())
    return output.getvalue().splitlines()


@pytest.mark.parametrize("theirs", [None, THEIRS], ids=["alone", "compared"])
def test_each_row_is_one_line_of_80_columns(theirs: Generation | None) -> None:
    lines = rendered(make_report(OURS, theirs))
    assert all(len(line) <= 80 for line in lines)
    assert not any("…" in line for line in lines)
    num_rows = 10 if theirs else 9
    assert len(lines) == 1 + 3 + num_rows + 1, "title, head, rows, foot"


def test_cells() -> None:
    rows = {}
    for line in rendered(make_report(OURS, THEIRS)):
        if line.startswith("│"):
            label, *cells = (cell.strip() for cell in line.strip("│").split("│"))
            rows[label] = cells
    assert rows["prompt tokens"] == ["4,711", "4,711"]
    assert rows["time to first token"] == ["9.8 s", "9.8 s"]
    assert rows["decode speed"] == ["12.3 tokens/s", "12.3 tokens/s"]
    assert rows["attended per step"] == ["13.7%", "100.0%"]
    assert rows["a full cache takes"] == ["106.0 MB", "106.0 MB"]
    assert rows["cache on the device"] == ["41.0 MB (39% of full)", "106.0 MB (100% of full)"]
    assert rows["cache on the host"] == ["53.0 MB (50% of full)", "0"]
    assert rows["equal tokens"] == ["50%", ""]


def test_nothing_was_generated() -> None:
    nothing = replace(OURS, tokens=[], first_token_seconds=None, tokens_per_second=None, interrupted=True)
    report = make_report(nothing, None)
    assert report.interrupted
    assert any("0 (interrupted)" in line for line in rendered(report))
    assert json.loads(json.dumps(report.to_dict()))["shadowkv"]["tokens_per_second"] is None


def test_equal_tokens() -> None:
    assert make_report(OURS, None).equal_tokens is None
    assert make_report(OURS, OURS).equal_tokens == 1
    assert make_report(OURS, THEIRS).equal_tokens == 0.5, "positions 0 and 2 of 4"


def test_object_for_programs() -> None:
    told = json.loads(json.dumps(make_report(OURS, THEIRS).to_dict()))
    assert told["equal_tokens"] == 0.5
    assert told["shadowkv"]["text"] == "An answer"
    assert told["full_attention"]["host_bytes"] == 0
    assert told["interrupted"] is False


def test_bytes() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 2_500_000, 7_300_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "2.5 MB",
        "7.3 GB",
    ]
