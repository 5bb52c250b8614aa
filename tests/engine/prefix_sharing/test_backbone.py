"""Models with shared prefixes against themselves without: hidden states, logits, gradients; and leaving."""

import copy
import logging
from typing import Any

import pytest
import torch
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from longshadow import share_prefixes
from longshadow.engine.prefix_sharing import disable_prefix_sharing, enable_prefix_sharing, interface
from longshadow.engine.prefix_sharing.attention.chains import attend_chains
from tests.engine.prefix_sharing.batches import groups, pad, pairs
from tests.engine.shadowkv.families import FAMILIES, tiny_model
from tests.model_zoo import tiny_model as zoo_model


def losses_and_gradients(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
    """A loss that depends on every real position's logits, as trainers compute them, and its gradients."""
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=mask, use_cache=False)
    logps = output.logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    weight = torch.linspace(-1, 1, len(ids), dtype=logps.dtype)[:, None] * (mask[:, 1:] * mask[:, :-1])
    (logps * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output, gradients


def assert_same(model: Any, ids: torch.Tensor, mask: torch.Tensor, tolerance: float = 1e-5) -> Any:
    """Models in fp64 still normalise in fp32; `test_attention` compares to fp64's own precision."""
    expected, expected_gradients = losses_and_gradients(model, ids, mask)
    with share_prefixes(model) as report:
        actual, gradients = losses_and_gradients(model, ids, mask)
    assert report.shared_batches == 1 and report.verified, report.reasons
    assert report.unique_tokens < report.padded_tokens == ids.numel()
    real = mask.bool()
    torch.testing.assert_close(actual.logits[real], expected.logits[real], rtol=0, atol=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = float(expected_gradients[name].abs().max()) + 1e-9
        assert float((gradient - expected_gradients[name]).abs().max()) <= tolerance * max(1, scale), name
    return actual, expected


# Their experts' matrix products, or their only attention with padding, exist in single precision alone.
SINGLE = {"qwen3_moe", "gpt_oss"}


def double_model(family: str, **overrides: Any) -> Any:
    """In fp64 and with SDPA where the family can; transformers' eager attention gives NaN for padding in fp64."""
    model = tiny_model(family, **overrides)
    if family in SINGLE:
        return model
    model.set_attn_implementation("sdpa")
    return model.double()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_every_family_is_unchanged(family: str, padding_side: str) -> None:
    rows = pairs() if padding_side == "right" else groups()
    tolerance = 1e-4 if family in SINGLE else 1e-5
    assert_same(double_model(family), *pad(rows, side=padding_side), tolerance)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_models_own_attention_serves_what_is_not_shared(implementation: str) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    ids, mask = pad(pairs())
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with share_prefixes(model, minimum_ratio=100) as report:
            actual = model(ids, attention_mask=mask).logits
            generated = model.generate(ids[:1], max_new_tokens=3, do_sample=False)
        assert model.config._attn_implementation == implementation
        assert torch.equal(generated, model.generate(ids[:1], max_new_tokens=3, do_sample=False))
    assert torch.equal(actual, expected)
    assert (report.shared_batches, report.ordinary_batches) == (0, 1), report.reasons


def test_generation_is_neither_counted_nor_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    ids, mask = pad(pairs(), side="left")
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    with caplog.at_level(logging.WARNING), share_prefixes(model) as report:
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False), expected)
        assert (report.shared_batches, report.ordinary_batches, report.reasons) == (0, 0, {})
        model(ids, attention_mask=mask)
    assert (report.shared_batches, report.ordinary_batches) == (1, 0)
    assert "the ordinary way" not in caplog.text


def test_mixture_of_experts_keeps_its_auxiliary_loss() -> None:
    model = double_model("qwen3_moe", output_router_logits=True)
    ids, mask = pad(pairs())
    actual, expected = assert_same(model, ids, mask, 1e-4)
    torch.testing.assert_close(actual.aux_loss, expected.aux_loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("attention", ["dense", "chains"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "llama"])
def test_double_precision_is_exact(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's normalisation is in fp32 whatever the weights are, and adds 1e-7 to gradients; here it is not."""

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    model = zoo_model(name, attention="sdpa").double()
    prompts = [[11, 12, 13, 14, 15], [21, 22, 23, 24, 25, 26, 27, 28, 29]]
    rows = [[*prompt, 40, last] for prompt in prompts for last in (41, 42, 43)]
    for ids, mask in (pad(pairs()), pad(rows, side="left")):
        expected, gradients = losses_and_gradients(model, ids, mask)
        with share_prefixes(model, attention=attention) as report:
            actual, mine = losses_and_gradients(model, ids, mask)
        assert report.shared_batches == 1, report.reasons
        real = mask.bool()
        largest = float(expected.logits[real].abs().max())
        torch.testing.assert_close(actual.logits[real], expected.logits[real], rtol=0, atol=1e-12 * largest)
        scale = max(float(gradient.abs().max()) for gradient in gradients.values())
        for key, gradient in gradients.items():
            torch.testing.assert_close(mine[key], gradient, rtol=0, atol=1e-12 * scale, msg=key)


def test_gradient_checkpointing() -> None:
    model = double_model("llama").train()
    model.gradient_checkpointing_enable()
    assert_same(model, *pad(pairs()))


def test_pad_tokens_inside_the_text_and_equal_rows() -> None:
    model = double_model("llama")
    assert_same(model, *pad([[5, 0, 0, 7], [5, 0, 0, 7], [5, 0, 0], [5, 0, 9]]))


def test_single_precision_is_close() -> None:
    model = tiny_model("llama")
    ids, mask = pad(pairs())
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with share_prefixes(model):
            actual = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)


def attributes(model: Any) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in model.modules()]


def test_leaving_restores_the_model_also_after_an_error() -> None:
    model = tiny_model("llama")
    before = attributes(model)
    with share_prefixes(model):
        assert attributes(model) != before
    assert attributes(model) == before
    with pytest.raises(KeyError), share_prefixes(model):
        raise KeyError
    assert attributes(model) == before


def test_enabling_again_changes_nothing() -> None:
    model = tiny_model("llama")
    ids, mask = pad(pairs())
    before = model.config._attn_implementation
    with share_prefixes(model) as report:
        assert enable_prefix_sharing(model) is report
        with share_prefixes(model) as inner:
            assert inner is report
        model(ids, attention_mask=mask)
        assert report.shared_batches == 1, "the inner block ended the outer one"
        with pytest.raises(ValueError, match="already enabled"):
            enable_prefix_sharing(model, minimum_ratio=2)
    for _ in range(2):
        disable_prefix_sharing(model)
    assert model.config._attn_implementation == before and "forward" not in vars(model.model)
    with share_prefixes(model, report=report):
        model(ids, attention_mask=mask)
    assert report.shared_batches == 2, "a report goes on counting"


def test_a_copy_of_the_model_is_a_plain_one() -> None:
    model = double_model("llama")
    before = [set(vars(module)) for module in model.modules()]
    ids, mask = pad(pairs())
    expected = model(ids, attention_mask=mask).logits
    with share_prefixes(model) as report:
        other = copy.deepcopy(model)
        assert torch.equal(other(ids, attention_mask=mask).logits, expected)
        assert report.shared_batches == 0
        assert [set(vars(module)) for module in other.modules()] == before
        with share_prefixes(other) as own:
            other(ids, attention_mask=mask)
        assert (report.shared_batches, own.shared_batches) == (0, 1)


def test_rows_that_share_nothing_run_the_ordinary_way(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    ids, mask = pad([[1, 2, 3], [4, 5, 6]])
    with share_prefixes(model) as report, torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            model(ids, attention_mask=mask)
    assert report.reasons == {"it has fewer than 1.1 padded tokens per distinct token": 3}
    assert caplog.text.count("runs the ordinary way") == 1, "the reason is told once"


def test_neftune_keeps_the_scale_of_its_noise() -> None:
    """It divides by the columns of what is embedded, which a tree has more of than the batch."""
    model = tiny_model("llama").train()
    ids, mask = pad(pairs())

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return model(ids, attention_mask=mask).logits

    handle = activate_neftune(model, 5.0)
    expected = run()
    with share_prefixes(model) as report:
        assert torch.equal(run(), expected)
        assert report.reasons == {"NEFTune scales its noise by the columns of the batch": 1}
        model.eval()
        run()
        model.train()
        deactivate_neftune(model, handle)
        run()
    assert (report.shared_batches, report.ordinary_batches) == (2, 1)


def test_the_first_batch_is_compared_with_the_ordinary_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The few tokens of the trial, when sharing is enabled, are not enough to find it.
        return attend_chains(query, *args, **kwargs) * (1.001 if query.shape[2] > 20 else 1)

    monkeypatch.setattr(interface, "choose_attention", lambda *args, **kwargs: attend)
    model = tiny_model("llama")
    ids, mask = pad(pairs())
    with share_prefixes(model), pytest.raises(RuntimeError, match="cannot share prefixes"):
        model(ids, attention_mask=mask)
    with share_prefixes(model, verify_first_batch=False) as report:
        model(ids, attention_mask=mask)
    assert report.shared_batches == 1 and not report.verified


def test_autocast_is_compared_in_its_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states come in fp32 there, from layers in bf16; a wrong attention is still told."""
    model = tiny_model("llama")
    ids, mask = pad(pairs())
    with torch.autocast("cpu", torch.bfloat16):
        with share_prefixes(model) as report:
            assert model.model(ids, attention_mask=mask).last_hidden_state.dtype == torch.float32
        assert report.shared_batches == 1 and report.verified
        monkeypatch.setattr(interface, "choose_attention", lambda *_, **__: lambda query, *_, **__: query)
        with share_prefixes(model), pytest.raises(RuntimeError, match="cannot share prefixes"):
            model(ids, attention_mask=mask)


def test_what_cannot_be_shared_is_refused_with_the_reason() -> None:
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(ValueError, match="with a head"), share_prefixes(bert):
        pass
    encoder_decoder = tiny_model("llama")
    encoder_decoder.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="it is an encoder-decoder"), share_prefixes(encoder_decoder):
        pass
    with pytest.raises(ValueError, match="minimum_ratio"), share_prefixes(tiny_model("llama"), minimum_ratio=0.5):
        pass


def test_a_model_that_is_broken_by_itself_is_told_apart() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[5] = torch.nan
    with share_prefixes(model), pytest.raises(RuntimeError, match="NaN or infinity without prefix sharing"):
        model(*pad([[5, 1, 2], [5, 1, 3]]))


def test_dropout_is_told_once_and_not_verified(caplog: Any) -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    ids, mask = pad(pairs())
    with caplog.at_level(logging.WARNING), share_prefixes(model) as report:
        first, second = (model(ids, attention_mask=mask).logits for _ in range(2))
        assert not torch.equal(first, second)
        told = [record for record in caplog.records if "dropout" in record.message]
        assert len(told) == 1 and report.verified
    with share_prefixes(model.eval()):
        assert torch.equal(*(model(ids, attention_mask=mask).logits for _ in range(2)))


def test_a_report_counts_tokens() -> None:
    model = tiny_model("llama")
    ids, mask = pad(pairs())
    with share_prefixes(model) as report:
        assert report.token_ratio == 1
        model(ids, attention_mask=mask)
    assert report.padded_tokens == ids.numel() and report.real_tokens == mask.sum()
    assert report.real_tokens > report.unique_tokens
    assert report.token_ratio == report.padded_tokens / report.unique_tokens


@pytest.mark.parametrize("attention", ["dense", "chains"])
def test_attention_by_name(attention: str) -> None:
    model = tiny_model("cohere2")  # a layer with a sliding window, one without
    ids, mask = pad(pairs())
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    with share_prefixes(model, attention=attention):
        actual = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4 * expected.abs().max().item())
    with pytest.raises(ValueError, match="attention must be one of"), share_prefixes(model, attention="fast"):
        pass
    with pytest.raises(ValueError, match="cannot run here"), share_prefixes(model, attention="varlen"):
        model(ids, attention_mask=mask)
