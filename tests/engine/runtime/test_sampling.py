from collections import Counter
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longshadow import SamplingParams
from longshadow.engine.runtime.model_defaults import ModelDefaults
from longshadow.engine.runtime.sampling import Sampler, choose_tokens, log_probabilities

VOCABULARY = 50
CPU = torch.device("cpu")
DEFAULTS = ModelDefaults(temperature=1.0)


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)).double() * 2


def sampler(index: int = 0, prompt: list[int] | None = None, ends: tuple[int, ...] = (), **params: Any) -> Sampler:
    filled = DEFAULTS.fill(SamplingParams(max_tokens=1000, **params), room=1000)
    return Sampler.of(filled, index=index, prompt=prompt or [1, 2, 3], end_tokens=ends, device=CPU, defaults=DEFAULTS)


def test_least_tokens_are_kept_where_the_logits_are() -> None:
    """By tensors that have a device and no memory."""
    params = DEFAULTS.fill(SamplingParams(max_tokens=9, min_tokens=3), room=9)
    with FakeTensorMode():
        device = torch.device("cuda")
        one = Sampler.of(params, index=0, prompt=[1, 2], end_tokens=[3], device=device, defaults=DEFAULTS)
        ids, scores = torch.zeros(1, 2, dtype=torch.long, device=device), torch.zeros(1, VOCABULARY, device=device)
        assert one.penalties(ids, scores).device.type == "cuda"


def test_greedy_takes_the_most_likely() -> None:
    rows = logits(3)
    assert choose_tokens(rows, [sampler(temperature=0) for _ in rows]) == rows.argmax(1).tolist()


def test_draws_with_the_probabilities_of_the_model() -> None:
    row, one = logits(1), sampler(seed=3, temperature=1.5)
    counts = Counter(choose_tokens(row, [one])[0] for _ in range(20_000))
    expected = (row[0] / 1.5).softmax(0)
    found = torch.tensor([counts[token] / 20_000 for token in range(VOCABULARY)], dtype=torch.float64)
    # Five standard deviations of the largest share.
    assert float((found - expected).abs().max()) < 5 * (0.25 / 20_000) ** 0.5


@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}, {"top_k": 7, "top_p": 0.8}])
def test_does_not_depend_on_what_is_in_the_batch(params: dict[str, Any]) -> None:
    rows = logits(6)
    together = [sampler(seed=seed, **params) for seed in range(6)]
    alone = [sampler(seed=seed, **params) for seed in range(6)]
    for _ in range(5):
        joint = choose_tokens(rows, together)
        assert joint == [choose_tokens(rows[i : i + 1], [alone[i]])[0] for i in range(6)]


def test_keeps_to_the_allowed_tokens() -> None:
    row = logits(1)
    best = set(row[0].topk(4).indices.tolist())
    assert {choose_tokens(row, [sampler(seed=seed, top_k=4)])[0] for seed in range(200)} == best


def test_completions_of_one_seed_differ_and_repeat() -> None:
    def run(index: int) -> list[int]:
        one = sampler(index, seed=5)
        return [choose_tokens(logits(1, seed=step), [one])[0] for step in range(8)]

    assert run(0) == run(0) != run(1)


def test_penalties_count_the_answer_only() -> None:
    row = torch.zeros(1, VOCABULARY, dtype=torch.float64)
    row[0, 3], row[0, 4], row[0, 5] = 3.0, 2.0, 1.5
    one = sampler(prompt=[3, 3, 3], temperature=0, presence_penalty=0.5, frequency_penalty=0.4)
    # 3: 3.0, then 2.1, then 1.7; 4: 2.0, then 1.1
    assert [choose_tokens(row, [one])[0] for _ in range(4)] == [3, 3, 4, 3]


def test_repetition_penalty_counts_the_prompt() -> None:
    row = torch.zeros(1, VOCABULARY, dtype=torch.float64)
    row[0, 3], row[0, 4] = 3.0, 2.0
    assert choose_tokens(row, [sampler(prompt=[3], temperature=0, repetition_penalty=2.0)]) == [4]


def test_end_tokens_wait_for_min_tokens() -> None:
    row = torch.zeros(1, VOCABULARY, dtype=torch.float64)
    row[0, 7], row[0, 8] = 3.0, 2.0
    one = sampler(ends=(7,), temperature=0, min_tokens=2)
    assert [choose_tokens(row, [one])[0] for _ in range(3)] == [8, 8, 7]


def test_a_draw_at_the_very_end_is_a_token_with_probability() -> None:
    row = torch.full((1, VOCABULARY), -torch.inf, dtype=torch.float64)
    row[0, 10], row[0, 20] = 0.0, 0.0
    one = sampler(seed=0)
    one.random.random = lambda: 1 - 2**-53  # type: ignore[method-assign]
    assert choose_tokens(row, [one]) == [20]


def test_log_probabilities() -> None:
    row = logits(1)[0]
    expected = row.log_softmax(0)
    order = row.argsort(descending=True).tolist()
    found = log_probabilities(row, order[2], 2, lambda token: f"<{token}>")
    assert (found.token_id, found.rank, found.token) == (order[2], 3, f"<{order[2]}>")
    assert found.logprob == pytest.approx(float(expected[order[2]]))
    assert [(token, text) for token, text, _ in found.top] == [(token, f"<{token}>") for token in order[:2]]
    assert [value for _, _, value in found.top] == pytest.approx([float(expected[token]) for token in order[:2]])
    assert log_probabilities(row, 0, 0, str).top == ()
