"""Requests made from the server's own description, right and wrong ones: it never fails, and keeps its word."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from longshadow.engine.runtime import LLM
from longshadow.engine.serving.application import make_application, make_service
from longshadow.engine.serving.settings import ServingSettings
from tests.engine.serving.conftest import CHAT_TEMPLATE, serving, wait_until
from tests.tiny_models import tiny_model, tiny_tokenizer

NUM_EXAMPLES = 30
LENGTH = 96

load_all_checks()
# What is described: statuses, kinds of content, their shapes. What is refused may be more than a schema can say.
CHECKED = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


def describe():
    """The description; it needs no engine."""
    service = make_service(FakeLength(), ServingSettings(model_name="tiny"))
    return make_application(service)._application.openapi()


class FakeLength:
    max_model_len = LENGTH


def operations():
    schema = schemathesis.openapi.from_dict(describe())
    return [result.ok() for result in schema.get_all_operations()]


@pytest.fixture(scope="module")
def server():
    """Short answers: the requests are many."""
    engine = LLM(
        tiny_model(),
        tokenizer=tiny_tokenizer(CHAT_TEMPLATE),
        max_model_len=LENGTH,
        max_num_seqs=4,
        device_memory="100MB",
    )
    with serving(engine, max_waiting_documents=1000) as server:
        yield server


CASES = [
    pytest.param(operation, mode, id=f"{mode.value}-{operation.label}")
    for operation in operations()
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or operation.body  # what is no body is any text
]


@pytest.mark.parametrize(("operation", "mode"), CASES)
def test_described_requests(server, operation, mode):
    checks = [CHECKS.get_one(name) for name in CHECKED]
    statuses = set()

    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "model" in case.body:
            # A description cannot say which names exist.
            case.body = case.body | {"model": "tiny", "document": None}
        statuses.add(case.call_and_validate(base_url=server.url, checks=checks, timeout=100).status_code)

    run()
    if mode is GenerationMode.POSITIVE and not operation.path_parameters:
        assert statuses & {200, 201}, "some of what is described is taken"


def test_nothing_is_left_over(server):
    with server.client() as client:
        for document in client.get("/v1/documents").json()["data"]:
            client.delete(f"/v1/documents/{document['id']}")
    wait_until(lambda: server.service.llm.statistics().num_running == 0)
    statistics = server.service.llm.statistics()
    assert statistics.num_waiting == statistics.num_documents == 0


def test_the_description_names_every_route():
    paths = describe()["paths"]
    assert {f"{method.upper()} {path}" for path, item in paths.items() for method in item} == {
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "POST /v1/documents",
        "GET /v1/documents",
        "GET /v1/documents/{document_id}",
        "DELETE /v1/documents/{document_id}",
        "GET /health",
        "GET /metrics",
    }
    for path, item in paths.items():
        for operation in item.values():
            refusals = [status for status in operation["responses"] if status >= "400"]
            for status in refusals:
                schema = operation["responses"][status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorBody"}, (path, status)
