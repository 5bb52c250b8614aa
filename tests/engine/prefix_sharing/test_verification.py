"""The comparison with the ordinary path: once per kind of batch, without a trace, with an answer to a mismatch."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from longshadow import PrefixTree, share_prefixes
from longshadow.engine.prefix_sharing import interface
from longshadow.engine.prefix_sharing.attention.chains import attend_chains
from longshadow.engine.prefix_sharing.undisturbed import undisturbed
from longshadow.engine.prefix_sharing.verification import kind_of
from tests.engine.prefix_sharing.batches import groups, pad, pairs
from tests.engine.shadowkv.families import tiny_model

DYNAMIC = dict(max_position_embeddings=32, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0))


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a model keeps beside its weights."""
    state: dict[str, Any] = {"random numbers": torch.get_rng_state()}
    for name, module in model.named_modules():
        state[f"{name}.training"] = module.training
        state |= {f"{name}.{key}": buffer.clone() for key, buffer in module._buffers.items()}
        plain = (int, float, bool, list, torch.Tensor)
        state |= {f"{name}.{key}": copy.copy(kept) for key, kept in vars(module).items() if isinstance(kept, plain)}
    return state


def assert_equal_states(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        equal = torch.equal(actual[name], value) if isinstance(value, torch.Tensor) else actual[name] == value
        assert equal, name


def test_dynamic_rope_is_what_it_would_be() -> None:
    """Its frequencies follow the longest batch so far: one more column, or another length, would change them."""
    batches = [torch.randint(2, 128, (2, length), generator=torch.Generator().manual_seed(0)) for length in (40, 38)]
    for ids in batches:
        ids[1, :30] = ids[0, :30]
    plain, shared = tiny_model("llama", **DYNAMIC), tiny_model("llama", **DYNAMIC)
    with torch.no_grad():
        expected = [plain(ids, use_cache=False).logits for ids in batches]
        before = state_of(shared)
        with share_prefixes(shared) as report:
            assert_equal_states(state_of(shared), before)
            actual = [shared(ids, use_cache=False).logits for ids in batches]
    assert report.shared_batches == 2 and report.verified
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    assert_equal_states(
        {key: value for key, value in state_of(shared).items() if "rotary" in key},
        {key: value for key, value in state_of(plain).items() if "rotary" in key},
    )


class Restless(nn.Module):
    """Changes everything a module can have whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counter", torch.zeros(3))
        self.register_buffer("frequencies", torch.ones(2), persistent=False)
        self.calls, self.seen, self.offset, self.drawn = 0, [1], torch.zeros(2), torch.ones(1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.counter += 1
        self.register_buffer("frequencies", torch.full((2,), 7.0), persistent=False)
        self.register_buffer("another", torch.ones(1))
        self.calls += 1
        self.seen.append(self.calls)
        self.offset.add_(1)
        self.drawn, self.new = torch.rand(1), "new"
        return hidden


def test_nothing_is_left_behind() -> None:
    module, broken = nn.Sequential(Restless(), nn.Dropout(0.5)).train(), nn.Linear(9, 9)
    before, frequencies = state_of(module), module[0].frequencies
    with undisturbed(module, torch.device("cpu")):
        module(torch.zeros(1))
    assert_equal_states(state_of(module), before)
    assert module[0].frequencies is frequencies and module.state_dict().keys() == {"0.counter"}
    assert not hasattr(module[0], "another") and not hasattr(module[0], "new")
    module.append(broken)
    with pytest.raises(RuntimeError, match="shape"), undisturbed(module, torch.device("cpu")):
        module(torch.zeros(1))
    del module[2]
    assert_equal_states(state_of(module), before)


def test_the_first_batch_of_each_kind_is_compared() -> None:
    model = tiny_model("llama").train()
    passes: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    many = [[7, 8, 9, 10, 11, 12, *range(20, 40), last] for last in range(2, 10)]
    batches = [pad(pairs()), pad(groups(), side="left"), pad(many)]
    kinds = {kind_of(PrefixTree.from_batch(*batch)) for batch in batches}
    assert len(kinds) == len(batches)
    with share_prefixes(model) as report:
        passes.clear()
        for number, batch in enumerate(batches, 1):
            for _ in range(2):
                model(*batch)
            assert report.verified_kinds == number
            assert len(passes) == 5 * number, "four passes of the first, one of the second"
    assert all(parameter.grad is None for parameter in model.parameters()) and model.model.layers[0].training


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that is a thousandth too large in long trees: the trial's few tokens do not show it."""

    def attend(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return attend_chains(query, *args, **kwargs) * (1.001 if query.shape[2] > 20 else 1)

    monkeypatch.setattr(interface, "choose_attention", lambda *args, **kwargs: attend)


@pytest.mark.usefixtures("wrong")
def test_a_mismatch_raises_or_makes_batches_ordinary() -> None:
    model = tiny_model("llama")
    ids, mask = pad(pairs())
    expected = model(ids, attention_mask=mask).logits
    with share_prefixes(model), pytest.raises(RuntimeError, match="cannot share prefixes"):
        model(ids, attention_mask=mask)
    with share_prefixes(model, on_mismatch="ordinary") as report:
        for _ in range(2):
            assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    assert report.reasons == {"a shared batch did not agree with the ordinary path": 2}
    assert (report.shared_batches, report.verified) == (0, False)
    with pytest.raises(ValueError, match="on_mismatch"), share_prefixes(model, on_mismatch="ignore"):
        pass


def test_a_loss_over_padding_is_told() -> None:
    """Padding is not computed: a loss that looks there would train something else."""
    model = tiny_model("llama")
    ids, mask = pad(pairs())
    with share_prefixes(model):
        loss = model(ids, attention_mask=mask).logits.logsumexp(-1).mean()
        with pytest.raises(RuntimeError, match="depends on what the model computes for padding"):
            loss.backward()
        (model(ids, attention_mask=mask).logits.logsumexp(-1) * mask).sum().backward()
