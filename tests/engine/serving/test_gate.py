"""What passes before any route: names, keys, sizes; and what every answer carries."""

import socket

import pytest

from longshadow.engine.serving.settings import ServingSettings
from tests.engine.serving.conftest import serving
from tests.engine.serving.fake_engine import FakeEngine
from tests.engine.serving.test_bodies import CHAT, refusal

LIMIT = 50_000


@pytest.fixture(scope="module")
def server():
    with serving(FakeEngine(), max_body_bytes=LIMIT) as server:
        yield server


@pytest.fixture(scope="module")
def locked():
    with serving(FakeEngine(), api_key="secret-key") as server:
        yield server


def raw(server, text: bytes, *, close_after: bool = False) -> bytes:
    """Whatever the server answers to these bytes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(text)
        if close_after:
            return b""
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def test_too_large_by_its_length(server):
    with server.client() as client:
        assert refusal(client.post("/v1/completions", content=b"x" * (LIMIT + 1)), 413)["code"] == "body_too_large"


def test_too_large_while_it_comes(server):
    def chunks():
        for _ in range(20):
            yield b"x" * 10_000

    with server.client() as client:
        response = client.post("/v1/completions", content=chunks())
        assert "content-length" not in response.request.headers
        assert refusal(response, 413)["code"] == "body_too_large"


def test_an_endless_body_is_cut_off(server):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(server, head + b"2710\r\n" + b"x" * 10_000 + b"\r\n" + (b"2710\r\n" + b"x" * 10_000 + b"\r\n") * 14)
    assert answer.startswith(b"HTTP/1.1 413")


def test_just_small_enough(server):
    with server.client() as client:
        padding = LIMIT - len('{"model":"tiny","prompt":"","max_tokens":1}')
        body = '{"model":"tiny","prompt":"' + "x" * padding + '","max_tokens":1}'
        assert len(body) == LIMIT
        response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 200, response.text


def test_leaving_in_the_middle_of_a_body_harms_nobody(server):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
    for _ in range(5):
        raw(server, head, close_after=True)
    with server.client() as client:
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic secret-key", "secret-key", "Bearer \xe9"])
def test_wrong_keys(locked, header):
    with locked.client() as client:
        headers = {"Authorization": header.encode("latin-1")} if header else {}
        for path in ("/v1/models", "/v1/documents", "/metrics", "/v1/nothing"):
            response = client.get(path, headers=headers)
            assert refusal(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"


def test_right_key(locked):
    assert locked.openai("secret-key").models.list().data[0].id == "tiny"
    with locked.client(headers={"Authorization": "bearer secret-key"}) as client:
        assert client.get("/metrics").status_code == 200


def test_open_paths_need_no_key(locked):
    with locked.client() as client:
        for path in ("/", "/health", "/openapi.json"):
            assert client.get(path).status_code == 200


def test_names_of_elsewhere_are_refused_without_a_key(server, locked):
    with server.client() as client:
        for host in ("evil.example", "evil.example:8000", "", "[", "127.0.0.1.evil.example"):
            assert refusal(client.get("/v1/models", headers={"Host": host}), 403)["code"] == "wrong_host"
        for host in ("localhost", "localhost:9000", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200
    with locked.client(headers={"Authorization": "Bearer secret-key"}) as client:
        assert client.get("/v1/models", headers={"Host": "models.example"}).status_code == 200


def test_headers_of_every_answer(server):
    with server.client() as client:
        for path in ("/", "/health", "/v1/nothing"):
            headers = client.get(path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
            assert "server" not in headers


def test_other_origins_get_no_permission(server):
    with server.client() as client:
        preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        response = client.options("/v1/completions", headers=preflight)
        assert response.status_code == 405
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": ""}, "model_name must not be empty"),
        ({"port": 65536}, "port must be between 0 and 65535, got 65536"),
        ({"port": -1}, "got -1"),
        ({"api_key": ""}, "api_key must be one or more printable ASCII characters"),
        ({"api_key": "schlüssel"}, "printable ASCII"),
        ({"max_body_bytes": 10}, "max_body_bytes must be at least 1,024, got 10"),
        ({"request_seconds": 0}, "request_seconds must be above 0"),
        ({"request_seconds": float("inf")}, "and finite"),
        ({"max_connections": 0}, "max_connections must be at least 1, got 0"),
        ({"patience_seconds": 0}, "patience_seconds must be above 0"),
        ({"grace_seconds": -1}, "grace_seconds must be at least 0"),
        ({"default_max_tokens": 0}, "default_max_tokens must be at least 1"),
        ({"max_waiting_documents": 0}, "max_waiting_documents must be at least 1"),
    ],
)
def test_settings_are_validated(changes, message):
    with pytest.raises(ValueError, match=message):
        ServingSettings(**{"model_name": "tiny"} | changes)


def test_only_loopback_is_local():
    assert all(ServingSettings(model_name="m", host=host).is_local for host in ("127.0.0.1", "localhost", "::1"))
    assert not any(ServingSettings(model_name="m", host=host).is_local for host in ("0.0.0.0", "10.0.0.5", "::"))


def test_requests_are_counted_by_route(server):
    with server.client() as client:
        client.post("/v1/chat/completions", json=CHAT)
        client.get("/v1/documents/doc-nothing")
        client.get("/wp-login.php")
        text = client.get("/metrics").text
    assert 'longshadow_http_requests_total{method="POST",route="/v1/chat/completions",status="200"}' in text
    assert 'route="/v1/documents/{document_id}",status="404"' in text
    assert "wp-login" not in text
