"""What the report says of a run."""

import pytest

from longshadow.compress.report import _method, summary


@pytest.mark.parametrize(
    ("method", "told"),
    [("fisher", "fisher, shrinkage 0.5"), ("eora", "eora, shrinkage 0.5"), ("diagonal", "diagonal"), ("svd", "svd")],
)
def test_shrinkage_is_told_where_it_changes_something(method: str, told: str) -> None:
    assert _method({"method": method, "shrinkage": 0.5}) == told


def test_an_interval_is_told_where_there_is_one() -> None:
    measured = {"recovered": 0.5, "samples": 1, "divergence_removed": {"mean": 0.25}}
    report = {"report": measured, "adapter_bytes": 10**6, "bits_per_weight": 0.5}
    assert "(0.2500 nats, on 1 sample that was not calibrated on)" in summary(report)
    measured |= {"samples": 2, "divergence_removed": {"mean": 0.25, "low": 0.125, "high": 0.5}}
    assert "(0.2500 nats, 95 % between 0.1250 and 0.5000, on 2 samples that were not" in summary(report)
