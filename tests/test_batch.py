"""Batch inference: files, what a line may hold, and a run that goes on where it was stopped."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from longshadow import LLM, SamplingParams
from longshadow.batch import run_batch
from longshadow.batch_files import Results, read_tasks
from longshadow.cli import app
from longshadow.engine.runtime import EngineDead
from tests.engine.runtime.engines import engine
from tests.tiny_models import write_folder

DEFAULTS = SamplingParams(max_tokens=4, temperature=0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with engine() as opened:
        yield opened


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def run(llm: LLM, source: Path, target: Path, **settings: Any) -> dict[int, Any]:
    with Results(target) as results:
        run_batch(llm, read_tasks(source, settings), results, DEFAULTS)
    return read(target)


def read(target: Path) -> dict[int, Any]:
    return {result["line"]: result for result in map(json.loads, target.read_bytes().splitlines())}


def test_every_line_gets_one_result(llm: LLM, tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "in",
        {"prompt": "abc", "id": "first"},
        "",
        {"prompt": [5, 6], "n": 2, "temperature": 1.0, "seed": 3},
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "logprobs": 1},
    )
    found = run(llm, source, tmp_path / "out")
    assert sorted(found) == [1, 3, 4]
    assert found[1]["id"] == "first"
    [expected] = llm.generate("abc", DEFAULTS)
    assert found[1]["outputs"][0]["text"] == expected.outputs[0].text
    assert found[1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 4}
    assert len(found[3]["outputs"]) == 2
    assert found[4]["usage"]["completion_tokens"] == 2 and len(found[4]["outputs"][0]["logprobs"]) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        ("[1]", "no JSON object"),
        ({"prompt": "a", "messages": []}, "either prompt or messages"),
        ({}, "either prompt or messages"),
        ({"prompt": "a", "temprature": 1}, "unknown field 'temprature'"),
        ({"prompt": "a", "temperature": -1}, "temperature must be"),
        ({"prompt": "a", "max_tokens": 5000}, "maximum context length is 4096 tokens"),
        ({"prompt": 5}, "prompt must be a text"),
        ({"prompt": [10**6]}, "token ids must be"),
        ({"messages": ["a"]}, "list of objects"),
        ({"prompt": "a", "stop": [""]}, "stop must hold"),
    ],
)
def test_a_line_that_cannot_be_answered_says_why(llm: LLM, tmp_path: Path, line: Any, reason: str) -> None:
    source = write_lines(tmp_path / "in", {"prompt": "abc"}, line)
    found = run(llm, source, tmp_path / "out")
    assert "outputs" in found[1]
    assert reason in found[2]["error"]


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a\\ud800b", "id": "\\ud800"}',
        '{"prompt": "a", "stop": ["\\udc00"]}',
        '{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        '{"messages": [{"role": "user", "content": ' + "[" * 900 + "]" * 900 + "}]}",
        '{"prompt": [true, false]}',
        '{"prompt": [1.0]}',
        '{"prompt": [[1]]}',
        '{"prompt": [null]}',
        '{"prompt": []}',
        '{"prompt": "a", "temperature": NaN}',
        '{"prompt": "a", "top_k": 1e400}',
        '{"prompt": "a", "seed": "x"}',
        '{"prompt": "a", "stop": 5}',
        '{"prompt": "a", "stop_token_ids": [1000000]}',
        '{"prompt": "a", "stop_token_ids": "1"}',
        '{"prompt": "a", "ignore_eos": "no"}',
        '{"prompt": "a", "n": 99}',
        '{"prompt": "\xff',
        '{"prompt": "a", "max_tokens": ' + "9" * 5000 + "}",
        "\x00",
    ],
)
def test_one_line_of_any_kind_stops_no_other(llm: LLM, tmp_path: Path, line: str) -> None:
    (source := tmp_path / "in").write_bytes(
        b'{"prompt": "abc"}\n' + line.encode("latin-1") + b'\n{"messages": [{"role": "user", "content": "b"}]}\n'
    )
    found = run(llm, source, tmp_path / "out")
    assert sorted(found) == [1, 2, 3] and "outputs" in found[1] and "outputs" in found[3]
    assert found[2]["error"] and "\n" not in found[2]["error"]
    with Results(tmp_path / "out") as results:
        counts = run_batch(llm, read_tasks(source, {}), results, DEFAULTS)
    assert (counts.answered, counts.refused, counts.done_before) == (0, 0, 3)


def test_a_line_on_which_the_engine_fails_is_that_line(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", {"prompt": "abc"}, {"prompt": "Poison"}, {"prompt": "def"})
    with engine() as llm:
        begin = llm._engine._starts.begin
        llm._engine._starts.begin = lambda job: begin(job) if len(job.prompt) == 3 else 1 // 0  # type: ignore
        found = run(llm, source, tmp_path / "out")
        assert "outputs" in found[1] and "outputs" in found[3]
        assert found[2]["error"] == "the engine failed on this request; its log says why"
        llm._runner.read = None  # type: ignore[method-assign, assignment]
        write_lines(source, *({"prompt": "abc"} for _ in range(3)))
        with pytest.raises(EngineDead):
            run(llm, source, tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == b""


def test_a_stopped_run_goes_on(llm: LLM, tmp_path: Path) -> None:
    source, target = write_lines(tmp_path / "in", *({"prompt": "abc" * n} for n in range(1, 7))), tmp_path / "out"
    whole = run(llm, source, target)
    lines = target.read_bytes().splitlines(keepends=True)
    # Killed in the middle of the fourth result.
    target.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    kept = read_whole(lines[:3])
    with Results(target) as results:
        counts = run_batch(llm, read_tasks(source, {}), results, DEFAULTS)
    assert (counts.answered, counts.done_before, counts.refused) == (3, 3, 0)
    assert read(target) == whole
    assert target.read_bytes().startswith(b"".join(lines[:3]))
    assert kept.keys() <= whole.keys()


def read_whole(lines: list[bytes]) -> dict[int, Any]:
    return {result["line"]: result for result in map(json.loads, lines)}


def test_results_of_another_run_are_left_alone(llm: LLM, tmp_path: Path) -> None:
    source, target = write_lines(tmp_path / "in", {"prompt": "abc"}), tmp_path / "out"
    run(llm, source, target, model="one")
    before = target.read_bytes()
    with pytest.raises(ValueError, match="of another input or of other settings"):
        run(llm, source, target, model="two")
    write_lines(source, {"prompt": "other"})
    with pytest.raises(ValueError, match="of another input or of other settings"):
        run(llm, source, target, model="one")
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        "a text\nof two lines\n",
        "{}\n",
        "no line's end",
        "[1]\n",
        '{"line": Infinity, "key": "a"}\n',
        "[" * 100_000 + "\n",
    ],
)
def test_a_file_that_holds_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    target = tmp_path / "out"
    target.write_text(content)
    with pytest.raises(ValueError, match="holds something else"):
        Results(target)
    assert target.read_text() == content


def test_ids_come_back_as_they_were(llm: LLM, tmp_path: Path) -> None:
    ids = ["\ud800", "\ud801", "é\u2028", 10**30, {"a": [None]}, "same", "same"]
    source = write_lines(tmp_path / "in", *({"prompt": "a", "id": one} for one in ids))
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes().replace(b"\n", b"\r\n"))
    found = run(llm, source, tmp_path / "out")
    assert [found[line + 1]["id"] for line in range(len(ids))] == ids
    assert all("outputs" in result for result in found.values())


def test_two_processes_do_not_share_an_output(tmp_path: Path) -> None:
    with Results(tmp_path / "out"), pytest.raises(ValueError, match="another process writes"):
        Results(tmp_path / "out")
    with Results(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command(tmp_path: Path) -> None:
    model = write_folder(tmp_path / "model")
    source = write_lines(tmp_path / "in", {"prompt": "abc"}, {"prompt": ""})
    target = tmp_path / "out"
    command = ["generate", "--model", str(model), "--input", str(source), "--output", str(target), "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--max-new-tokens", "3", "--json"])
    assert result.exit_code == 1, result.stderr
    assert json.loads(result.stdout) == {"answered": 1, "refused": 1, "done_before": 0}
    assert read(target)[1]["usage"]["completion_tokens"] == 3
    pipe, through = tmp_path / "pipe", tmp_path / "through"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(source.read_bytes(),), daemon=True).start()
    piped = [str(through) if word == str(target) else str(pipe) if word == str(source) else word for word in command]
    result = CliRunner().invoke(app, [*piped, "--max-new-tokens", "3", "--json"])
    assert json.loads(result.stdout) == {"answered": 1, "refused": 1, "done_before": 0}
    assert read(through) == read(target)
    again = CliRunner().invoke(app, [*command, "--max-new-tokens", "3"])
    assert again.exit_code == 0 and "2 were there already" in again.stderr
    other = CliRunner().invoke(app, [*command, "--max-new-tokens", "4"])
    assert other.exit_code == 2 and "other settings" in other.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either --prompt-file"),
        (["--input", "a"], "belong together"),
        (["--output", "a", "--prompt-file", "b"], "belong together"),
        (["--input", "a", "--output", "b", "--prompt-file", "c"], "either --prompt-file"),
        (["--input", "a", "--output", "./a"], "must be different files"),
        (["--input", "a", "--output", "b", "--question", "c"], "--question is for one prompt"),
        (["--input", "a", "--output", "b", "--compare"], "--compare is for one prompt"),
        (["--input", "/none/in", "--output", "b"], "cannot read /none/in"),
        (["--input", __file__, "--output", "/dev/null"], "it is a device or a pipe"),
        (["--input", __file__, "--output", "~nobody-of-this-name/b"], "does not exist: make it first"),
        (["--prompt-file", "~nobody-of-this-name/b"], "No such file"),
    ],
)
def test_mistakes_end_with_one_line(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", "--model", "demo", *options])
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.symlink_to(other)
    other.symlink_to(one)
    for options in (["--input", str(one), "--output", "b"], ["--input", __file__, "--output", str(one)]):
        result = CliRunner().invoke(app, ["generate", "--model", "demo", *options])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ") and "Too many levels of symbolic links" in result.stderr
