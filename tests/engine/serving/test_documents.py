"""Documents over HTTP: reading, asking, saving, loading, deleting."""

import errno
import hashlib
import json
import os
import threading
import time
from pathlib import Path

import openai
import pytest

from longshadow import SamplingParams
from longshadow.engine.runtime import DocumentError
from tests.engine.serving.conftest import serving, wait_until
from tests.engine.serving.fake_engine import FakeEngine
from tests.engine.serving.test_bodies import COMPLETION, refusal

TEXT = "The code of the northern gate is 7412. " * 60
QUESTION = [{"role": "user", "content": "Which code?"}]


def create(client, text=TEXT, **fields):
    response = client.post("/v1/documents", json={"text": text, **fields})
    assert response.status_code == 201, response.text
    return response.json()


def ready(client, identity):
    """The document once it has been read or has failed."""
    state = {}

    def is_done():
        state.update(client.get(f"/v1/documents/{identity}").json())
        return state["status"] in ("ready", "failed")

    wait_until(is_done)
    return state


def test_life_of_a_document(server, llm):
    with server.client() as client:
        made = create(client, name="gate.txt")
        assert made["object"] == "document" and made["name"] == "gate.txt"
        assert made["status"] in ("waiting", "reading")
        state = ready(client, made["id"])
        assert state["status"] == "ready" and state["error"] is None and not state["saved"]
        assert state["num_read_tokens"] == state["num_tokens"] > 1500
        memory = state["memory"]
        assert memory["device_bytes"] == sum(memory["device"].values())
        assert memory["host_bytes"] == sum(memory["host"].values()) > 0
        assert 0 < memory["device_bytes"] < memory["full_cache_bytes"]
        assert client.get("/v1/documents").json()["data"] == [state]
        assert client.delete(f"/v1/documents/{made['id']}").json()["deleted"] is True
        assert client.get("/v1/documents").json()["data"] == []
        assert refusal(client.get(f"/v1/documents/{made['id']}"), 404)["code"] == "document_not_found"
        assert refusal(client.delete(f"/v1/documents/{made['id']}"), 404)["param"] == "document"
    assert llm.statistics().num_documents == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_question_waits_for_its_document_and_shares_it(server, llm, stream):
    client = server.openai()
    with server.client() as http:
        identity = create(http)["id"]
        request = dict(model="tiny", messages=QUESTION, temperature=0, max_tokens=10, extra_body={"document": identity})
        if stream:
            chunks = list(
                client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
            usage = chunks[-1].usage
        else:
            answer = client.chat.completions.create(**request)
            text, usage = answer.choices[0].message.content, answer.usage
        num_tokens = ready(http, identity)["num_tokens"]
        http.delete(f"/v1/documents/{identity}")
    with_document = llm.add_document(TEXT)
    prompt = llm.chat_prompt(QUESTION, document=with_document)
    [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=10), document=with_document)
    llm.remove_document(with_document)
    assert text == output.outputs[0].text
    assert usage.prompt_tokens == num_tokens + len(prompt)
    assert usage.prompt_tokens_details.cached_tokens == num_tokens


def test_a_completion_goes_on_from_a_document(server, llm):
    with server.client() as http:
        identity = create(http)["id"]
        body = COMPLETION | {"document": identity, "temperature": 0, "prompt": " and"}
        usage = http.post("/v1/completions", json=body).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - len(" and")
        http.delete(f"/v1/documents/{identity}")


def test_an_unknown_document(server):
    with server.client() as client:
        for identity in ("doc-nothing", "", "../../etc/passwd"):
            error = refusal(client.post("/v1/completions", json=COMPLETION | {"document": identity}), 404)
            assert (error["param"], error["code"]) == ("document", "document_not_found")


def test_a_document_that_is_too_long_fails(server, llm):
    with server.client() as client:
        state = ready(client, create(client, "x" * (llm.max_model_len + 1))["id"])
        assert state["status"] == "failed" and "tokens" in state["error"]
        error = refusal(client.post("/v1/completions", json=COMPLETION | {"document": state["id"]}))
        assert error["code"] == "document_failed" and state["error"] in error["message"]
        client.delete(f"/v1/documents/{state['id']}")


def test_blank_texts_and_names(server):
    with server.client() as client:
        refusal(client.post("/v1/documents", json={"text": ""}))
        refusal(client.post("/v1/documents", json={"text": "x", "name": ""}))
        refusal(client.post("/v1/documents", json={"text": "x", "name": "n" * 201}))
        refusal(client.post("/v1/documents", json={"text": 5}))
        state = ready(client, create(client, "  \n ")["id"])
        assert state["status"] == "failed" and "empty" in state["error"]
        client.delete(f"/v1/documents/{state['id']}")


def test_saved_documents_are_there_after_a_restart(llm, tmp_path):
    with serving(llm, keeps_engine=True, documents_dir=tmp_path) as server, server.client() as client:
        identity = create(client, name="gate")["id"]
        wait_until(lambda: ready(client, identity)["saved"])
        before = client.get(f"/v1/documents/{identity}").json()
        ask = COMPLETION | {"document": identity, "temperature": 0, "max_tokens": 8}
        answer = client.post("/v1/completions", json=ask).json()["choices"]
        [document] = [record.document for record in server.service.documents.records()]
    llm.remove_document(document)
    assert [path.name for path in tmp_path.iterdir()] == [f"{identity}.safetensors"]
    with serving(llm, keeps_engine=True, documents_dir=tmp_path) as server, server.client() as client:
        [after] = client.get("/v1/documents").json()["data"]
        assert after["status"] == "ready" and after["saved"]
        for field in ("id", "name", "num_tokens", "memory"):
            assert after[field] == before[field]
        assert client.post("/v1/completions", json=ask).json()["choices"] == answer
        client.delete(f"/v1/documents/{identity}")
    assert list(tmp_path.iterdir()) == []
    assert llm.statistics().num_documents == 0


def test_files_that_cannot_be_loaded_are_left_alone(llm, tmp_path, caplog):
    damaged = tmp_path / f"doc-{'0' * 24}.safetensors"
    damaged.write_bytes(b"nothing of the kind")
    foreign = tmp_path / "model.safetensors"
    foreign.write_bytes(b"someone else's")
    with serving(llm, keeps_engine=True, documents_dir=tmp_path) as server, server.client() as client:
        assert client.get("/v1/documents").json()["data"] == []
    assert damaged.exists() and foreign.exists()
    assert f"{damaged} cannot be loaded" in caplog.text
    assert f"{foreign} was not saved by this server" in caplog.text


def test_links_to_nowhere_are_left_alone(llm, tmp_path, caplog):
    link = tmp_path / f"doc-{'1' * 24}.safetensors"
    link.symlink_to(tmp_path / "nothing")
    with serving(llm, keeps_engine=True, documents_dir=tmp_path) as server, server.client() as client:
        assert client.get("/v1/documents").json()["data"] == []
    assert link.is_symlink() and f"{link} cannot be loaded" in caplog.text


def test_names_that_are_no_text_can_be_listed(tmp_path):
    with serving(FakeEngine()) as server, server.client() as client:
        server.service.documents.add_file(Path(os.fsdecode(b"caf\xe9.txt")), TEXT)
        [listed] = client.get("/v1/documents").json()["data"]
        assert listed["name"] == "caf?.txt"


def test_a_deleted_document_leaves_no_text_behind():
    with serving(FakeEngine(document_tempo=10)) as server, server.client() as client:
        first, second = (create(client)["id"] for _ in range(2))
        waiting = server.service.documents.find(second)
        assert waiting.text == TEXT
        client.delete(f"/v1/documents/{second}")
        assert waiting.text is None
        client.delete(f"/v1/documents/{first}")


class SavedMeanwhile:
    """A lock for which another thread, that saves the document, was quicker."""

    def __init__(self, lock, record):
        self.lock, self.record = lock, record

    def __enter__(self):
        self.record.is_saved = True
        return self.lock.__enter__()

    def __exit__(self, *error):
        return self.lock.__exit__(*error)


def test_a_document_that_is_saved_while_it_is_deleted_leaves_no_file(monkeypatch, tmp_path):
    with serving(FakeEngine(), documents_dir=tmp_path) as server, server.client() as client:
        store, identity = server.service.documents, create(client)["id"]
        wait_until(lambda: ready(client, identity)["saved"])
        record = store.find(identity)
        record.is_saved = False
        monkeypatch.setattr(store, "_lock", SavedMeanwhile(store._lock, record))
        store.delete(identity)
        assert list(tmp_path.iterdir()) == []


def test_a_document_that_cannot_be_saved_can_be_used(monkeypatch, tmp_path):
    def full(self, path):
        raise DocumentError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("tests.engine.serving.fake_engine.FakeDocument.save", full)
    with serving(FakeEngine(), documents_dir=tmp_path) as server, server.client() as client:
        identity = create(client)["id"]
        wait_until(lambda: ready(client, identity)["error"] is not None)
        state = ready(client, identity)
        assert state["status"] == "ready" and not state["saved"] and "No space left" in state["error"]
        assert client.post("/v1/completions", json=COMPLETION | {"document": identity}).status_code == 200


def test_as_many_wait_as_may():
    with serving(FakeEngine(document_tempo=10), max_waiting_documents=2) as server, server.client() as client:
        first = create(client)["id"]
        wait_until(lambda: client.get(f"/v1/documents/{first}").json()["status"] == "reading")
        waiting = [create(client)["id"] for _ in range(2)]
        assert refusal(client.post("/v1/documents", json={"text": "x"}), 429)["code"] == "too_many_documents"
        for identity in (waiting[0], first):
            client.delete(f"/v1/documents/{identity}")
        started = time.monotonic()
        wait_until(lambda: client.get(f"/v1/documents/{waiting[1]}").json()["status"] == "reading")
        assert time.monotonic() - started < 8, "a deleted document is read no further"


def test_a_document_that_is_deleted_while_it_is_read_leaves_nothing(tmp_path):
    engine = FakeEngine(document_tempo=0.5)
    with serving(engine, documents_dir=tmp_path) as server, server.client() as client:
        identity = create(client)["id"]
        client.delete(f"/v1/documents/{identity}")
        ready(client, create(client, "another")["id"])
        assert [document.num_tokens for document in engine.documents] == [len("another")]
        error = refusal(client.post("/v1/completions", json=COMPLETION | {"document": identity}), 404)
        assert error["code"] == "document_not_found"


def test_what_waits_for_a_deleted_document_is_told():
    with serving(FakeEngine(document_tempo=2.0)) as server, server.client() as client:
        identity = create(client)["id"]
        threading.Timer(0.3, lambda: client.delete(f"/v1/documents/{identity}")).start()
        with pytest.raises(openai.NotFoundError):
            server.openai().completions.create(model="tiny", prompt="x", extra_body={"document": identity})


def test_the_end_fails_documents_that_wait():
    engine = FakeEngine(document_tempo=20.0)
    with serving(engine, grace_seconds=0.1) as server, server.client() as client:
        identities = [create(client)["id"] for _ in range(3)]
    assert [server.service.documents.find(one).status for one in identities] == ["failed"] * 3
    assert {server.service.documents.find(one).error for one in identities} == {"the server is stopping"}
    assert engine.num_readings == 1, "texts that wait are not even tokenised"


def test_only_the_last_failures_are_kept():
    with serving(FakeEngine(document_failure=ValueError("no"))) as server, server.client() as client:
        for _ in range(40):
            ready(client, create(client)["id"])
        assert len(client.get("/v1/documents").json()["data"]) == 32


def test_a_file_given_at_the_start_is_read_once(tmp_path):
    path = tmp_path / "report.txt"
    folder = tmp_path / "documents"
    for _ in range(2):
        with serving(FakeEngine(), documents_dir=folder) as server, server.client() as client:
            record = server.service.documents.add_file(path, TEXT)
            wait_until(lambda record=record: record.is_saved)
            [state] = client.get("/v1/documents").json()["data"]
            assert state["name"] == "report.txt"
    assert len(list(folder.iterdir())) == 1


def pending(folder, **fields):
    """A text that a server left."""
    identity = f"doc-{fields.pop('number', 7):024x}"
    text = fields.get("text", TEXT)
    digest = hashlib.sha256(text.encode()).hexdigest()
    whole = {"format": "longshadow text", "name": "gate", "created": 1_700_000_000, "text": text, "sha256": digest}
    path = folder / f"{identity}.pending.json"
    path.write_text(json.dumps(whole | fields))
    return identity, path


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_text_is_on_the_disk_when_it_is_accepted(tmp_path):
    engine = FakeEngine(document_tempo=20.0)
    with serving(engine, grace_seconds=0.1, documents_dir=tmp_path) as server, server.client() as client:
        made = [create(client, f"text {number}", name=str(number)) for number in range(3)]
        assert files(tmp_path) == sorted(f"{one['id']}.pending.json" for one in made)
        assert client.delete(f"/v1/documents/{made[1]['id']}").status_code == 200
        assert len(files(tmp_path)) == 2
    assert engine.documents == [] and len(files(tmp_path)) == 2, "the end of the server keeps them, too"
    engine = FakeEngine()
    with serving(engine, documents_dir=tmp_path) as server, server.client() as client:
        for one in (made[0], made[2]):
            wait_until(lambda one=one: ready(client, one["id"])["saved"])
            after = client.get(f"/v1/documents/{one['id']}").json()
            assert (after["name"], after["created"], after["num_tokens"]) == (
                one["name"],
                one["created"],
                len("text 0"),
            )
        assert files(tmp_path) == sorted(f"{one['id']}.safetensors" for one in (made[0], made[2]))


def test_a_text_that_was_read_and_saved_is_not_read_again(tmp_path):
    identity, path = pending(tmp_path)
    (tmp_path / f"{identity}.safetensors").write_text("gate\n2340")
    engine = FakeEngine()
    with serving(engine, documents_dir=tmp_path) as server, server.client() as client:
        assert ready(client, identity)["saved"] and engine.num_readings == 0
    assert not path.exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"text": 5},
        {"text": "other", "sha256": "0"},
        {"created": "now"},
        {"name": 5},
        {"format": "another"},
    ],
    ids=str,
)
def test_damaged_texts_are_left_alone(fields, tmp_path, caplog):
    _, path = pending(tmp_path) if not isinstance(fields.get("text", ""), str) else pending(tmp_path, **fields)
    if not isinstance(fields.get("text", ""), str):
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with serving(FakeEngine(), documents_dir=tmp_path) as server, server.client() as client:
        assert client.get("/v1/documents").json()["data"] == []
    assert path.exists()
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{path} cannot be read: it ") and "\n" not in line


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"[]"], ids=lambda content: str(content[:5]))
def test_files_that_are_no_texts_are_left_alone(content, tmp_path, caplog):
    path = tmp_path / f"doc-{'0' * 24}.pending.json"
    path.write_bytes(content)
    with serving(FakeEngine(), documents_dir=tmp_path) as server, server.client() as client:
        assert client.get("/v1/documents").json()["data"] == []
    assert path.exists() and caplog.text.count(f"{path} cannot be read") == 1


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EROFS, 503)])
def test_a_text_that_cannot_be_kept_is_not_accepted(number, status, monkeypatch, tmp_path):
    engine = FakeEngine()
    with serving(engine, documents_dir=tmp_path) as server, server.client() as client:

        def fails(handle):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("longshadow.engine.runtime.durable.os.fsync", fails)
        error = refusal(client.post("/v1/documents", json={"text": TEXT}), status)
        assert os.strerror(number) in error["message"] and error["param"] is None
        assert client.get("/v1/documents").json()["data"] == []
        assert files(tmp_path) == []
        monkeypatch.undo()
        identity = create(client)["id"]
        wait_until(lambda: ready(client, identity)["saved"])
    assert engine.num_readings == 1


@pytest.mark.parametrize(("failure", "kept"), [(ValueError("no"), False), (KeyError("oh"), True)])
def test_a_text_at_fault_is_not_read_again(failure, kept, tmp_path):
    with serving(FakeEngine(document_failure=failure), documents_dir=tmp_path) as server, server.client() as client:
        identity = create(client)["id"]
        assert ready(client, identity)["status"] == "failed"
        assert (tmp_path / f"{identity}.pending.json").exists() == kept
        client.delete(f"/v1/documents/{identity}")
        assert files(tmp_path) == []


def test_a_text_whose_document_cannot_be_saved_is_kept(monkeypatch, tmp_path):
    def full(self, path):
        raise DocumentError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("tests.engine.serving.fake_engine.FakeDocument.save", full)
    with serving(FakeEngine(), documents_dir=tmp_path) as server, server.client() as client:
        identity = create(client)["id"]
        wait_until(lambda: ready(client, identity)["error"] is not None)
        assert files(tmp_path) == [f"{identity}.pending.json"]
