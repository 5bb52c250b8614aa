"""What Prometheus is told: the engine's figures now, and what requests brought and took."""

from prometheus_client.parser import text_string_to_metric_families

from longshadow.engine.serving.metrics import GAUGES
from tests.engine.serving.conftest import serving
from tests.engine.serving.test_bodies import COMPLETION


def figures(client):
    """Values by name, those with labels apart."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(response.text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def test_figures_of_engine_and_requests(llm):
    with serving(llm, keeps_engine=True) as server, server.client() as client:
        before = figures(client)
        for prompt in ("one", "three"):
            assert client.post("/v1/completions", json=COMPLETION | {"prompt": prompt}).status_code == 200
        after = figures(client)
        statistics = llm.statistics()
    for name, (attribute, _) in GAUGES.items():
        if name != "tokens_per_second":  # of the last seconds, so it goes down by itself
            assert after[f"longshadow_{name}"] == getattr(statistics, attribute)
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained["longshadow_generated_tokens_total"] == 6
    assert gained["longshadow_prompt_tokens_total"] == len("one") + len("three") - 1, "`th` is one token"
    assert gained["longshadow_cancelled_requests_total"] == 0
    for name in ("time_to_first_token", "request", "queue"):
        assert gained[f"longshadow_{name}_seconds_count"] == 2
        assert gained[f"longshadow_{name}_seconds_sum"] > 0
