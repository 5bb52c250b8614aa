"""`longshadow serve`: mistakes in one line, signals, a kill, and what is there after it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("fastapi")

from httpx2 import Client

from longshadow.cli import app
from longshadow.serve_cli import served_name
from tests.tiny_models import write_folder

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120.0
FAULTY = """
from longshadow.cli import app
from longshadow.engine.runtime.runner import ModelRunner

def fail(*_):
    raise RuntimeError("simulated: device-side assert")

ModelRunner.decode = fail
app()
"""
TEXT = "The code of the northern gate is 7412. " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


@contextmanager
def serving(model, *options, program=("-m", "longshadow.cli"), **environment):
    """The command in a process of its own; yields it and a client."""
    command = [sys.executable, *program, "serve", str(model), "--port", "0", "--device-memory", "200MB"]
    paths = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *map(str, options)],
        cwd=ROOT,
        env=os.environ | paths | environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        while not lines or " at http://" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        url = re.search(r"http://\S+", lines[-1])[0]
        with Client(base_url=url, timeout=PATIENCE, trust_env=False) as client:
            client.lines = lines
            yield process, client
    finally:
        process.kill()
        process.communicate()


def ready(client, identity):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        state = client.get(f"/v1/documents/{identity}").json()
        if state["status"] == "ready" and state["saved"]:
            return state
        assert state["status"] != "failed", state
        time.sleep(0.05)
    raise AssertionError("the document did not become ready")


def complete(client, **fields):
    body = {"model": "tiny-llama", "prompt": "which?", "temperature": 0, "max_tokens": 8} | fields
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


@pytest.mark.slow
def test_documents_survive_a_kill(model, tmp_path):
    report = tmp_path / "report.txt"
    report.write_text("report " * 200)
    folder = tmp_path / "documents"
    with serving(model, "--documents-dir", folder, "--document", report) as (process, client):
        assert client.lines[-1].startswith("serving tiny-llama at http://127.0.0.1:")
        identity = client.post("/v1/documents", json={"text": TEXT, "name": "gate"}).json()["id"]
        before = ready(client, identity)
        [from_file] = [one for one in client.get("/v1/documents").json()["data"] if one["id"] != identity]
        assert from_file["name"] == "report.txt"
        answer = complete(client, document=identity)
        process.send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE) == -signal.SIGKILL
    with serving(model, "--documents-dir", folder, "--document", report) as (process, client):
        after = client.get("/v1/documents").json()["data"]
        assert sorted(one["id"] for one in after) == sorted([identity, from_file["id"]])
        loaded = next(one for one in after if one["id"] == identity)
        assert loaded["status"] == "ready" and loaded["memory"] == before["memory"]
        assert complete(client, document=identity) == answer
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def test_an_engine_that_cannot_go_on_ends_the_process(model):
    with serving(model, program=("-c", FAULTY)) as (process, client):
        response = client.post("/v1/completions", json={"model": "tiny-llama", "prompt": "x", "max_tokens": 8})
        assert response.status_code == 500 and "simulated" not in response.text
        assert process.wait(PATIENCE) == 3
        log = process.stderr.read()
    assert "Traceback" in log and "RuntimeError: simulated: device-side assert" in log
    assert "the engine failed and has ended" in log
    assert log.splitlines()[-1] == "error: the engine failed, so the server has ended; the log above says why"


@pytest.mark.slow
def test_a_document_survives_a_kill_while_it_is_read(model, tmp_path):
    with serving(model, "--documents-dir", tmp_path) as (process, client):
        made = client.post("/v1/documents", json={"text": TEXT, "name": "gate"})
        process.send_signal(signal.SIGKILL)
        assert made.status_code == 201 and process.wait(PATIENCE) == -signal.SIGKILL
    identity = made.json()["id"]
    with serving(model, "--documents-dir", tmp_path) as (process, client):
        state = ready(client, identity)
        assert (state["name"], state["created"]) == ("gate", made.json()["created"])
        first = complete(client, document=identity)
        again = client.post("/v1/documents", json={"text": TEXT}).json()["id"]
        ready(client, again)
        assert complete(client, document=again) == first
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            f"{one}.safetensors" for one in (identity, again)
        )


def test_ctrl_c_finishes_what_is_open(model):
    with serving(model, "--name", "renamed", LONGSHADOW_API_KEY="from-the-environment") as (process, client):
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = "Bearer from-the-environment"
        assert client.get("/v1/models").json()["data"][0]["id"] == "renamed"
        body = {"model": "renamed", "prompt": "x", "max_tokens": 400, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            told = [line for line in lines if line]
        assert told[-1] == "data: [DONE]"
        assert process.wait(PATIENCE) == 0
        assert "Traceback" not in process.stderr.read()


def error_of(*arguments):
    """The one line on stderr of a mistake."""
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "port must be between 0 and 65535, got 70000"),
        (["--host", "no-such-host.invalid"], "cannot listen on no-such-host.invalid port 8000"),
        (["--max-body-mb", "0"], "max_body_bytes must be at least 1,024, got 0"),
        (["--request-seconds", "0"], "request_seconds must be above 0"),
        (["--api-key", "ключ"], "printable ASCII"),
        (["--document", "missing.txt"], "cannot read the prompt file missing.txt: No such file"),
        (["--adapter", "missing"], "missing"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--max-num-seqs", "0"], "max_num_seqs must be a whole number, at least 1, got 0"),
        (["--max-model-len", "1000000"], "max_model_len must be at most 4096"),
        (["--device-memory", "much"], "device_memory"),
    ],
)
def test_mistakes(model, options, message):
    port = [] if "--port" in options or "--host" in options else ["--port", "0"]
    assert message in error_of(model, *port, *options)


def test_an_unknown_model():
    assert "there is no folder ./missing" in error_of("./missing", "--port", 0)


def test_a_port_that_is_taken(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in error_of(model, "--port", port)


def test_a_documents_folder_that_is_a_file(model, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    assert "it is a file, and must be a folder" in error_of(model, "--port", 0, "--documents-dir", path)


def test_missing_libraries(model, monkeypatch):
    monkeypatch.setattr("longshadow.serve_cli.LIBRARIES", ("fastapi", "no_such_library"))
    assert "serving needs no-such-library; install them with `pip install 'longshadow[serve]'`" in error_of(model)


def test_names_of_models(model, tmp_path):
    assert served_name("demo") == "demo"
    assert served_name("owner/model") == "owner/model"
    assert served_name(f"{model}/") == "tiny-llama"


def test_the_key_is_not_in_the_report(monkeypatch):
    monkeypatch.setenv("LONGSHADOW_API_KEY", "very-secret")
    from longshadow import env

    assert env.facts()["LONGSHADOW_API_KEY"] == "set"
    assert "very-secret" not in env.report()


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from longshadow.cli import app\n"
        "sys.argv = ['longshadow', 'serve', '--help']\n"
        "try:\n"
        "    app()\n"
        "except SystemExit:\n"
        "    names = ('torch', 'transformers', 'fastapi', 'uvicorn')\n"
        "    print([name for name in names if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
