from typing import Any

import pytest

from longshadow import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop_token_ids", (-1,)),
        ("seed", -1),
        ("seed", 2**63),
        ("logprobs", -1),
        ("logprobs", 1000),
        ("max_tokens", 0),
        ("min_tokens", 17),
    ],
)
def test_refuses_what_is_out_of_range_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must "):
        SamplingParams(**{field: value})


def test_takes_the_edges_of_the_ranges() -> None:
    SamplingParams(top_p=1, min_p=1, presence_penalty=-2, temperature=0, top_k=-1, seed=2**63 - 1, min_tokens=16)


def test_one_stop_text_is_a_tuple_of_one() -> None:
    assert SamplingParams(stop="end").stops == ("end",)
    assert SamplingParams(stop=("a", "b")).stops == ("a", "b")
    assert SamplingParams(stop=None, stop_token_ids=None).stops == ()
