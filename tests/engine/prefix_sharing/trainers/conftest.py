"""What runs of TRL's trainers train on, and how far runs with shared prefixes were from runs without."""

import random
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("datasets", reason="needs the extra train")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.engine.prefix_sharing.trainers.runs import VOCABULARY


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    vocabulary = {f"w{index}": index for index in range(VOCABULARY - 3)}
    vocabulary |= {"<pad>": VOCABULARY - 3, "<eos>": VOCABULARY - 2, "<unk>": VOCABULARY - 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def preferences() -> Any:
    chance = random.Random(0)

    def text(shortest: int, longest: int) -> str:
        return " ".join(f"w{chance.randrange(VOCABULARY - 3)}" for _ in range(chance.randint(shortest, longest)))

    rows = [
        {"prompt": text(20, 60) + " ", "chosen": text(3, 30) + " <eos>", "rejected": text(3, 30) + " <eos>"}
        for _ in range(8)
    ]
    return Dataset.from_list(rows)


@pytest.fixture(autouse=True)
def _report_differences(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """Has `assert_same` note the largest difference it accepted; `make test-trl-versions` collects it."""
    assert_same = getattr(request.module, "assert_same", None)
    if assert_same is None:
        return

    def noting(mine: Any, theirs: Any, *others: Any, **more: Any) -> None:
        assert_same(mine, theirs, *others, **more)
        record_property("largest_difference", f"{largest_difference(mine, theirs):.1e}")

    monkeypatch.setattr(request.module, "assert_same", noting)


def largest_difference(mine: Any, theirs: Any) -> float:
    """Over the metrics of all steps and all weights, relative to 1 or the value if that is larger."""
    (logged, weights), (expected, expected_weights) = mine, theirs
    differences = [
        abs(actual[key] - step[key]) / max(1, abs(step[key]))
        for actual, step in zip(logged, expected, strict=True)
        for key in step
        if "time" not in key and "per_second" not in key and key != "total_flos"
    ]
    for name, weight in weights.items():
        other = expected_weights[name]
        differences.append(float(((weight - other).abs() / other.abs().clamp(min=1)).max()))
    return max(differences)
