"""Clients that keep connections and send nothing, or little: they have a time, and make room for others."""

import itertools
import json
import logging
import resource
import socket
import threading
from contextlib import ExitStack, contextmanager, suppress

import pytest

from longshadow.engine.serving import open_files
from longshadow.engine.serving.sparing import Sparing
from tests.engine.serving.conftest import serving, wait_until
from tests.engine.serving.fake_engine import FakeEngine
from tests.engine.serving.test_bodies import COMPLETION

HALF_A_HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "
HALF_A_BODY = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@contextmanager
def connections(server, count, content):
    """So many connections that have sent this."""
    host, port = server.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection((host, int(port)), timeout=30)) for _ in range(count)]
        for connection in opened:
            connection.sendall(content)
        yield opened


def received(connection):
    """Everything until the server closes."""
    answer = b""
    try:
        while chunk := connection.recv(65536):
            answer += chunk
    except ConnectionResetError:
        pass
    return answer


def is_well(connection):
    """Whether the server says so."""
    answer = b""
    while not answer.endswith(b'{"status":"ok"}'):
        chunk = connection.recv(65536)
        assert chunk, answer
        answer += chunk
    return answer.startswith(b"HTTP/1.1 200")


def num_open(server):
    return len(server.server.server_state.connections)


@pytest.mark.parametrize("content", [b"", HALF_A_HEAD], ids=["nothing", "half a head"])
def test_headers_have_a_time(content):
    with serving(FakeEngine(), patience_seconds=0.3) as server, connections(server, 2, content) as (first, second):
        for connection in (first, second):
            head, _, body = received(connection).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408")
            assert json.loads(body)["error"]["code"] == "slow_headers"


def test_headers_that_trickle_have_no_more():
    with serving(FakeEngine(), patience_seconds=0.5) as server, connections(server, 1, HALF_A_HEAD) as (connection,):
        connection.settimeout(0.05)
        for _ in range(200):
            try:
                connection.sendall(b"x")
                assert connection.recv(100).startswith(b"HTTP/1.1 408")
                break
            except TimeoutError:
                pass
        else:
            raise AssertionError("it went on")


def test_the_second_request_of_a_connection_has_a_time():
    with serving(FakeEngine(), patience_seconds=0.5) as server, connections(server, 1, WHOLE) as (connection,):
        assert is_well(connection)
        connection.sendall(HALF_A_HEAD)
        assert received(connection).startswith(b"HTTP/1.1 408")


def test_a_third_request_that_came_with_two_others_has_a_time():
    three = WHOLE + WHOLE + HALF_A_HEAD
    with serving(FakeEngine(), patience_seconds=0.5) as server, connections(server, 1, three) as (connection,):
        answer = received(connection)
        assert answer.count(b"HTTP/1.1 200") == 2 and answer.count(b"HTTP/1.1 408") == 1


def test_a_body_that_stops_has_a_time():
    with serving(FakeEngine(), patience_seconds=0.3) as server, connections(server, 1, HALF_A_BODY) as (connection,):
        answer = received(connection)
        assert answer.startswith(b"HTTP/1.1 408") and b"slow_body" in answer


def test_an_idle_connection_stays():
    with serving(FakeEngine(), patience_seconds=0.2) as server, connections(server, 1, WHOLE) as (connection,):
        for _ in range(3):
            assert is_well(connection)
            threading.Event().wait(0.4)
            connection.sendall(WHOLE)


def test_an_answer_that_nobody_reads_is_given_up():
    engine = FakeEngine(word="x" * 100_000)
    with serving(engine, patience_seconds=0.3) as server:
        body = json.dumps(COMPLETION | {"stream": True, "max_tokens": 1000}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with connections(server, 1, head + b"Content-Length: %d\r\n\r\n" % len(body) + body):
            wait_until(lambda: engine.num_started == 1)
            wait_until(lambda: num_open(server) == 0 and engine.num_open == 0)


@pytest.mark.parametrize("content", [b"", HALF_A_HEAD, HALF_A_BODY, WHOLE], ids=["nothing", "head", "body", "idle"])
def test_those_that_wait_make_room(content, caplog):
    with serving(FakeEngine(), max_connections=20) as server, connections(server, 50, content) as opened:
        with server.client() as client:
            for _ in range(3):
                assert client.get("/health").status_code == 200
        wait_until(lambda: num_open(server) <= 20)
        if content != WHOLE:
            assert received(opened[0]) == b"", "the longest waiting was closed"
    assert caplog.text.count("clients are connected") == 1


def test_requests_at_work_do_not_make_room():
    engine = FakeEngine(tempo=0.02)
    with serving(engine, max_connections=3) as server, ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(server.client())
            body = COMPLETION | {"max_tokens": 10_000, "stream": True}
            stack.enter_context(client.stream("POST", "/v1/completions", json=body))
        assert engine.num_open == 3
        with server.client() as client:
            response = client.get("/health")
            assert response.status_code == 503 and response.headers["connection"] == "close"
            assert response.json()["error"]["code"] == "too_many_connections"
        assert engine.num_open == 3
        stack.close()
        wait_until(lambda: num_open(server) < 3)
        with server.client() as client:
            assert client.get("/health").status_code == 200


def test_what_is_no_http_is_refused_as_everything_else():
    with serving(FakeEngine()) as server, connections(server, 1, b"\x16\x03\x01 hello\r\n\r\n") as (connection,):
        head, _, body = received(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "invalid_http"


@contextmanager
def few_files(spare):
    """A limit of open files that leaves so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(path.name) for path in open_files.OPEN_FILES.iterdir()}
    *_, last = itertools.islice((number for number in itertools.count() if number not in used), spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_leave_files_for_others():
    with few_files(100):
        assert 30 <= open_files.room_for_connections(1024) <= 52
        assert open_files.room_for_connections(5) == 5


def test_without_files_one_line_is_logged(caplog):
    with (
        serving(FakeEngine()) as server,
        few_files(40),
        connections(server, 10, HALF_A_HEAD) as opened,
        ExitStack() as files,
    ):
        wait_until(lambda: num_open(server) == 10)
        taken = []
        with suppress(OSError):
            while len(taken) < 100:
                taken.append(files.enter_context(open("/dev/null")))
        assert 10 < len(taken) < 30
        taken[-1].close()  # for our side of a connection, which leaves none for the server's
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as late:
            late.sendall(WHOLE)
            assert is_well(late)
        assert received(opened[0]) == b"", "the longest waiting was closed for it"
        assert num_open(server) < 10
    assert caplog.text.count("files that this process may open") == 1
    assert len(caplog.records) == 1 and "Traceback" not in caplog.text


def test_the_limit_of_open_files_is_raised():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard, 500), hard))
        open_files.raise_limit()
        assert open_files.limit() == min(hard, open_files.MOST_OPEN_FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_message_is_logged_once_a_minute(caplog, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    sparing = Sparing(logging.getLogger("longshadow.test"))
    for _ in range(3):
        sparing.warning("full")
    now += 61
    sparing.warning("full")
    assert [record.getMessage() for record in caplog.records] == ["full", "full (2 times more in the last minutes)"]
