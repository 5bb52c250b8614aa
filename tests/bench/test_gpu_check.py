"""The step machinery of gpu_check, with steps that need no GPU, and what can be said of the real ones without."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from bench import gpu_check
from bench.gpu_check import RESULTS, STEPS, Step, read_results, run_steps
from bench.revision import REPOSITORY
from bench.table import load_table

# What a machine for the check need not have, beyond what the steps say.
OTHERS = ("datasets", "fastapi", "gguf", "hypothesis", "matplotlib", "openai", "setuptools", "trl", "typer", "uvicorn")


def python_step(name, code, **changes):
    return Step(name=name, arguments=("-c", code), modules=changes.get("modules", {}))


def run(tmp_path, *steps, limit_seconds=60.0, **variables):
    environment = {"OUT": str(tmp_path / "out"), "COMMIT": "abc", **variables}
    return run_steps(steps, environment, limit_seconds=limit_seconds)


def result(tmp_path, name):
    return read_results(tmp_path / "out")[name]


def test_all_steps_leave_one_file(tmp_path):
    record = "import sys; open(sys.argv[1], 'w').write('[1]'); print('measured')"
    table = Step(name="table", arguments=("-c", record, "{record}"), modules={})
    assert run(tmp_path, python_step("first", "print('hello')"), table) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [RESULTS]
    assert result(tmp_path, "first")["output"].strip() == "hello"
    assert result(tmp_path, "table")["record"] == [1]


def test_a_failing_step_fails_the_check_and_the_next_still_runs(tmp_path):
    assert run(tmp_path, python_step("bad", "raise SystemExit(3)"), python_step("good", "pass")) == 1
    assert result(tmp_path, "bad")["status"] == "exit status 3" and not result(tmp_path, "bad")["passed"]
    assert result(tmp_path, "good")["passed"]


def test_a_finished_step_is_skipped_unless_forced(tmp_path, capfd):
    counting = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    for variables in ({}, {}, {"FORCE": "1"}):
        assert run(tmp_path, python_step("only", counting), **variables) == 0
    assert (tmp_path / "count").read_text() == "xx"


def test_a_step_stopped_by_the_clock_runs_again(tmp_path):
    slow_once = (
        f"import os, time; path = {str(tmp_path / 'started')!r}; again = os.path.exists(path); "
        "open(path, 'w').close(); time.sleep(0 if again else 60)"
    )
    step = python_step("slow", slow_once)
    assert run(tmp_path, step, limit_seconds=1.0) == 1
    assert result(tmp_path, "slow")["status"] == "stopped after 1 s"
    assert run(tmp_path, step) == 0


def test_steps_can_be_chosen(tmp_path):
    steps = [python_step(name, "pass") for name in "abc"]
    assert run(tmp_path, *steps, STEP="b") == 0
    assert list(read_results(tmp_path / "out")) == ["b"]
    assert run(tmp_path, *steps, STEP="c,a") == 0
    assert list(read_results(tmp_path / "out")) == ["b", "c", "a"]


def test_an_unknown_step_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="there are a, b"):
        run(tmp_path, python_step("a", "pass"), python_step("b", "pass"), STEP="c")


def test_missing_wheels_are_named(tmp_path):
    step = python_step("table", "pass", modules={"no_such_module": "no-such-wheel"})
    assert run(tmp_path, step, python_step("next", "pass")) == 1
    assert "needs these wheels: no-such-wheel" in result(tmp_path, "table")["status"]
    assert result(tmp_path, "next")["passed"]


def test_a_step_without_its_tool_is_skipped_with_the_reason_until_there_is_one(tmp_path, monkeypatch):
    step = Step(name="check", arguments=("-c", "print('ran')"), modules={}, tool="some-tool", tool_options=("--all",))
    assert run(tmp_path, step) == 0
    assert result(tmp_path, "check")["status"].startswith("skipped: there is no some-tool")
    tool = tmp_path / "cuda" / "bin" / "some-tool"
    tool.parent.mkdir(parents=True)
    tool.write_text('#!/bin/sh\necho "$1" with "$CHECKED"; shift; exec "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert run(tmp_path, replace(step, variables={"CHECKED": "yes"})) == 0
    assert result(tmp_path, "check")["output"].split() == ["--all", "with", "yes", "ran"]


def test_what_a_stopped_step_has_started_is_stopped_too(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started = time.monotonic()
    assert run(tmp_path, python_step("slow", code), limit_seconds=2.0) == 1
    assert time.monotonic() - started < 30


def test_a_missing_out_is_said():
    with pytest.raises(ValueError, match="set OUT"):
        run_steps((), {})


def test_without_cuda_one_line_and_status_two(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("STEP", raising=False)
    assert gpu_check.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_step_is_said_without_cuda_too(monkeypatch, capsys):
    monkeypatch.setenv("STEP", "nothing")
    assert gpu_check.main() == 2
    assert "there are extension, tests" in capsys.readouterr().err


def test_the_real_steps():
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names) and gpu_check.STEP_SECONDS <= 480
    assert names[:5] == ["extension", "tests", "ops_gpu", "decode_gpu", "prefill_gpu"]
    slow = [name for name in names if name.startswith("memcheck_")]
    assert slow and names[-len(slow) :] == slow
    for step in STEPS:
        for argument in step.arguments:
            if argument.startswith("tests/"):
                assert (REPOSITORY / argument).is_file()
        if "run" in step.arguments:
            assert "cuda" in load_table(step.arguments[3]).configs
    operators = {path.parent.name for path in (REPOSITORY / "engine" / "ops").glob("*/reference.py")}
    assert operators <= {name for names in gpu_check.OPERATOR_TESTS.values() for name in names}


def files_of(step):
    return [argument for argument in step.arguments if argument.startswith("tests/")]


def test_every_test_for_a_gpu_is_in_a_step():
    marked = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        if re.search(r"^(@|pytestmark = )pytest\.mark\.gpu", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(marked) > 5
    assert marked <= {path for step in STEPS if not step.tool_options for path in files_of(step)}


@pytest.mark.parametrize("names", [["tests"], ["decoding"], [f"operators_{part}" for part in gpu_check.OPERATOR_TESTS]])
def test_steps_collect_their_tests_with_no_more_than_they_say(names):
    """The other libraries are hidden. Pytest's status is 0 only if every file is imported; each holds tests."""
    steps = [step for step in STEPS if step.name in names]
    files = [path for step in steps for path in files_of(step)]
    [modules] = {tuple(step.modules) for step in steps}
    options = {step.arguments[3 : -len(files_of(step))] for step in steps}
    hidden = {name: None for name in OTHERS if name not in modules}
    code = f"import sys; sys.modules.update({hidden}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", "--collect-only", *options.pop(), *files],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": "src", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line} == set(files)
