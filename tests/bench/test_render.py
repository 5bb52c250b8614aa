"""Records as Markdown, and RESULTS.md."""

import pytest

from bench import render
from bench.record import Check
from bench.table import Column, Outcome, Table, Target
from tests.bench.test_record import make_record

COLUMNS = (
    Column(key="method", heading="method"),
    Column(key="median", heading="median", unit="s"),
    Column(key="speedup", heading="speed-up", unit="x", speedup=True),
    Column(key="unused", heading="unused"),
)
TABLE = Table(
    name="example",
    title="An example",
    about="About it.",
    configs={"cpu": None},
    quick=lambda config: config,
    columns=COLUMNS,
    targets=(
        Target(text="fast enough", row={"method": "fast"}, column="speedup", at_least=4.0),
        Target(text="faster still", row={"method": "fast"}, column="speedup", at_least=6.0),
        Target(text="slow enough", row={"method": "slow"}, column="median", at_most=1.0),
    ),
    run=lambda config, session: Outcome(rows=[], check=Check(passed=True, max_error=None, text="")),
)


@pytest.mark.parametrize(
    ("value", "column", "text"),
    [
        (None, Column(key="k", heading="h", unit="s"), "–"),
        (0.0, Column(key="k", heading="h", unit="s"), "0 µs"),
        (0.01234, Column(key="k", heading="h", unit="s"), "12.3 ms"),
        (3 * 2**20, Column(key="k", heading="h", unit="B"), "3 MiB"),
        (1.5e9, Column(key="k", heading="h", unit="B/s"), "1.5 GB/s"),
        (0.125, Column(key="k", heading="h", unit="%"), "12.50 %"),
        (6.3333, Column(key="k", heading="h", unit="x"), "6.33×"),
        (131072, Column(key="k", heading="h", unit="count"), "131,072"),
        (20, Column(key="k", heading="h"), "20"),
        ("full", Column(key="k", heading="h"), "full"),
    ],
)
def test_cells(value, column, text):
    assert render.format_value(value, column) == text


def test_a_record_shows_command_check_rows_and_targets():
    text = render.render_record(make_record(), TABLE)
    assert "`python -m bench run example`" in text
    assert "Check passed: outputs agree." in text
    assert "| fast | 100 ms | 5.00× |" in text
    assert "unused" not in text
    assert "| fast enough | ≥ 4.00× | 5.00× | met |" in text
    assert "| faster still | ≥ 6.00× | 5.00× | missed |" in text
    assert "| slow enough | ≤ 1 s | – | not measured |" in text


def test_a_red_check_shows_no_speed_up():
    red = make_record(check=Check(passed=False, max_error=1.0, text="outputs differ"))
    text = render.render_record(red, TABLE)
    assert "Check FAILED: outputs differ." in text
    assert "5.00×" not in text and "hidden: check failed" in text


def test_the_page_keeps_cpu_and_gpu_apart(monkeypatch):
    monkeypatch.setattr(render, "load_table", lambda name: TABLE)
    monkeypatch.setattr(render, "table_names", lambda: ["example"])
    page = render.render_page([make_record(), make_record(device="nvidia-h200")])
    cpu, gpu = page.split("## GPU tables")
    assert "### An example (CPU)" in cpu and "nvidia-h200" not in cpu
    assert "### An example (nvidia-h200)" in gpu


def test_results_page_is_what_the_records_say():
    assert render.page_is_current(), "run `python -m bench render`"


def test_a_changed_page_is_noticed(tmp_path):
    page = tmp_path / "RESULTS.md"
    assert not render.page_is_current(results=tmp_path, page=page)
    page.write_text(render.render_page([]))
    assert render.page_is_current(results=tmp_path, page=page)
    page.write_text(page.read_text() + "edited")
    assert not render.page_is_current(results=tmp_path, page=page)
