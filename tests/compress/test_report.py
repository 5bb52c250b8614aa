"""What the report says of a run."""

import pytest

from longshadow.compress.report import _method


@pytest.mark.parametrize(
    ("method", "told"),
    [("fisher", "fisher, shrinkage 0.5"), ("eora", "eora, shrinkage 0.5"), ("diagonal", "diagonal"), ("svd", "svd")],
)
def test_shrinkage_is_told_where_it_changes_something(method: str, told: str) -> None:
    assert _method({"method": method, "shrinkage": 0.5}) == told
