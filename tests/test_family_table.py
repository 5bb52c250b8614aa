"""The committed table of model types is what a run gives, and README lists what it says.

CI tries with the cache the types that are refused, which is cheap, and one of each kind of those that work;
`tests/engine/prefix_sharing/test_sweep.py` does so for sharing, and `make test-families` tries all.
"""

from typing import Any

import pytest
import transformers

from tests.family_table import COLUMNS, README, read_table, try_types, with_list
from tests.model_zoo import NOT_BUILT, TYPES

# Each has something that no other here has, and `tests/engine/shadowkv/test_families.py` does not try.
REPRESENTATIVES = (
    "afmoe",  # gated attention, dense and sparse layers
    "beam",  # layers without RoPE whose queries are scaled by position
    "ministral3",  # queries scaled by position
    "cohere",  # interleaved RoPE
    "gemma2",  # soft-capped logits
    "glm",  # interleaved RoPE of half a head
    "mimo_v2_flash",  # values narrower than keys
    "smollm3",  # layers without RoPE
    "stablelm",  # RoPE of a quarter of a head
    "aria_text",  # a text model of a multimodal one
)


def test_every_type_is_in_the_table() -> None:
    table = read_table()
    assert table["transformers"] == transformers.__version__, "run `make test-families` with the new transformers"
    assert list(table["types"]) == sorted(TYPES)
    for name, row in table["types"].items():
        assert row.get("not_built") == NOT_BUILT.get(name)
        for column in COLUMNS:
            assert name in NOT_BUILT or row[column] == "equal" or (row[column] == "refused" and row[f"{column}_reason"])


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_types_that_work_do(name: str) -> None:
    row = with_the_cache(read_table()["types"][name])
    assert row["cache"] == "equal" and try_types([name], ["cache"]) == {name: row}


def test_types_that_are_refused_are_refused_with_the_same_reason() -> None:
    types = read_table()["types"]
    refused = {name: with_the_cache(row) for name, row in types.items() if row.get("cache") == "refused"}
    assert len(refused) > 50 and try_types(refused, ["cache"]) == refused


def with_the_cache(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("sharing")}


def test_readme_lists_what_the_table_says() -> None:
    readme = README.read_text(encoding="utf-8")
    assert with_list(readme, read_table()) == readme
