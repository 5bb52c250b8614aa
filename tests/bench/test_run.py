"""Running a table from the command line, and the tables' own declarations."""

import subprocess
from dataclasses import dataclass, is_dataclass, replace

import pytest

from bench import __main__ as command_line
from bench import revision, runner
from bench.record import Check, Record
from bench.table import Column, Outcome, Table, Target, load_table, table_names


@dataclass(frozen=True, kw_only=True)
class Config:
    length: int = 8


def make_table(*, passed: bool) -> Table:
    def run(config, session):
        rows = [{"method": "fast", "length": config.length, "speedup": 7.5}]
        return Outcome(rows=rows, check=Check(passed=passed, max_error=0.25, text="compared"))

    return Table(
        name="example",
        title="An example",
        about="About it.",
        configs={"cpu": Config()},
        quick=lambda config: replace(config, length=2),
        columns=(
            Column(key="method", heading="method"),
            Column(key="speedup", heading="speed-up", unit="x", speedup=True),
        ),
        targets=(),
        run=run,
    )


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command line on an example table; returns exit status and record."""

    def run(*options: str, passed: bool = True):
        monkeypatch.setattr(command_line, "load_table", lambda name: make_table(passed=passed))
        output = tmp_path / "record.json"
        status = command_line.main(["run", "example", "--output", str(output), *options])
        return status, Record.from_json(output.read_text()) if output.exists() else None

    return run


def test_a_green_run(run, capsys):
    status, record = run()
    assert status == 0 and record.check.passed and record.config == {"length": 8}
    assert record.command == "python -m bench run example"
    assert "7.50×" in capsys.readouterr().out


def test_a_red_run_refuses_the_speed_up(run, capsys):
    status, record = run(passed=False)
    assert status == 1 and not record.check.passed
    assert "7.50×" not in capsys.readouterr().out


def test_a_quick_run_says_so(run):
    _, record = run("--quick", "--seed", "3")
    assert record.quick and record.config == {"length": 2} and record.seed == 3
    assert record.command == "python -m bench run example --quick --seed 3"
    assert not record.is_publishable


def test_users_errors_are_one_line(run, capsys):
    status, record = run("--device", "cuda")
    assert status == 2 and record is None
    assert capsys.readouterr().err.strip() == "error: example runs on cpu, not on cuda"


def test_an_unknown_table_names_the_known_ones(capsys):
    assert command_line.main(["run", "nothing"]) == 2
    error = capsys.readouterr().err
    assert "needle" in error and error.count("\n") == 1


def test_units_are_forgotten_after_a_finished_run(tmp_path):
    def measure(config, session):
        session.unit("a", lambda: 1)
        return Outcome(rows=[], check=Check(passed=True, max_error=None, text="nothing"))

    runner.run_table(replace(make_table(passed=True), run=measure), results=tmp_path)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_commit_is_told_where_there_is_no_git(tmp_path):
    told = revision.current_revision(commit=None, environment={"COMMIT": "abc"}, repository=tmp_path)
    assert (told.commit, told.branch, told.dirty) == ("abc", None, False)
    unknown = revision.current_revision(commit=None, environment={}, repository=tmp_path)
    assert unknown.commit == "unknown" and unknown.dirty


def test_only_what_runs_write_may_differ_from_the_commit(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def is_dirty():
        return revision.current_revision(commit=None, environment={}, repository=tmp_path).dirty

    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    assert not is_dirty()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "new.json").write_text("{}")
    assert not is_dirty()
    (tmp_path / "code.py").write_text("2")
    assert is_dirty()


@pytest.mark.parametrize("name", table_names())
def test_tables_are_consistent(name):
    table = load_table(name)
    columns = {column.key for column in table.columns}
    for target in table.targets:
        assert {target.column, *target.row} <= columns
    for config in table.configs.values():
        assert is_dataclass(config) and config.__dataclass_params__.frozen
        assert table.quick(config) != config


def test_a_target_has_one_bound():
    with pytest.raises(ValueError, match="exactly one"):
        Target(text="both", row={}, column="speedup", at_least=1, at_most=2)
