"""What is said of a run: the right effect, another one, none, or a refusal."""

from pathlib import Path

import pytest

from longshadow.compress.adapters.comparison import TokenLogprobs
from longshadow.compress.adapters.runtimes import running
from longshadow.compress.adapters.runtimes.running import judged

PLAIN, ADAPTED = [-1.0, -2.0, -3.0], [-1.5, -1.8, -4.0]
EXPECTED = TokenLogprobs(ids=[1, 2, 3, 4], plain=PLAIN, adapted=ADAPTED)


def shifted(values: list[float], by: float) -> list[float]:
    return [value + by * (-1) ** index for index, value in enumerate(values)]


@pytest.mark.parametrize(
    ("result", "serves", "told"),
    [
        ({"plain": shifted(PLAIN, 1e-3), "adapted": shifted(ADAPTED, 2e-3)}, True, "with PEFT 1,"),
        ({"plain": PLAIN, "adapted": shifted(PLAIN, 1e-6)}, False, "it does nothing"),
        (
            {"plain": PLAIN, "adapted": [2 * a - p for a, p in zip(ADAPTED, PLAIN, strict=True)]},
            False,
            "something else",
        ),
        ({"plain": PLAIN, "adapted": [-1.5, -1.8, -3.0]}, False, "something else"),
        ({"plain": shifted(PLAIN, 0.5), "adapted": shifted(ADAPTED, 0.5)}, None, "too much to tell by"),
        (
            {"plain": PLAIN, "stage": "adapter", "error": "no such module"},
            False,
            "refuses the adapter (no such module)",
        ),
        ({"stage": "base", "error": "no memory"}, None, "could not run the base (no memory)"),
    ],
)
def test_judged(result: dict[str, object], serves: bool | None, told: str) -> None:
    found = judged({"version": "1.2", "stage": "adapter"} | result, EXPECTED)
    assert found.serves is serves and told in found.told and "1.2" in found.told


def test_a_runtime_that_aborts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process ends alone, with its last line as the reason."""
    monkeypatch.setattr(running.sys, "executable", "/bin/false")
    found = running._result({"runtime": "vLLM"}, tmp_path)
    assert found == {"stage": "base", "error": "it ended with code 1: in silence"}
