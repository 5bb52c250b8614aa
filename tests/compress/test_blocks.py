"""A model walked block by block against its own forward: outputs, logits and gradients, for every family."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longshadow import compensate
from longshadow.compress.blocks import (
    compensated,
    decoder_blocks,
    first_inputs,
    linear_layers,
    logits_after,
    main_output,
    run_block,
)
from longshadow.compress.sensitivity import output_sensitivity
from tests.model_zoo import NOT_BUILT, TYPES, tiny_model

WINDOW = 24  # of the zoo's layers with windows
BUILT = [name for name in TYPES if name not in NOT_BUILT]
# Layers of several types in turn, caches that layers share, inputs of each layer's own, and states beside the hidden
# ones: with more blocks than the zoo's two.
IN_TURN = ["sliding_attention", "full_attention"] * 2
LONGER: dict[str, dict[str, Any]] = {
    "cohere2": dict(layer_types=IN_TURN),
    "exaone4": dict(layer_types=IN_TURN),
    "gemma2": dict(layer_types=IN_TURN),
    "gemma3": dict(num_hidden_layers=2),  # that can see, too
    "gemma3_text": dict(layer_types=IN_TURN),
    "gemma3n_text": dict(
        layer_types=IN_TURN, num_kv_shared_layers=2, intermediate_size=[64] * 4, activation_sparsity_pattern=[0.0] * 4
    ),
    "gemma4_text": dict(layer_types=IN_TURN, num_kv_shared_layers=2),
    "gpt_oss": dict(layer_types=IN_TURN),
    "jamba": {},
    "llama4_text": dict(attention_chunk_size=16, layer_types=["chunked_attention", "full_attention"] * 2),
    "nanochat": {},
    "olmo3": dict(layer_types=IN_TURN),
    "qwen2": dict(use_sliding_window=True, layer_types=IN_TURN),
    "qwen3_5_text": dict(layer_types=["linear_attention", "full_attention"] * 2),
    "qwen3_next": dict(layer_types=["linear_attention", "full_attention"] * 2),
    "smollm3": dict(layer_types=["full_attention"] * 4),
    "zaya": dict(num_hidden_layers=2),
}
# Families that are refused keep their blocks elsewhere than in `layers`.
ELSEWHERE = (
    "bert,bert-generation,big_bird,bloom,camembert,codegen,cpmant,ctrl,data2vec-text,dbrx,electra,ernie,falcon,git,gpt-sw3,"
    "gpt2,gpt_bigcode,gpt_neo,gptj,hrm_text,megatron-bert,mpt,openai-gpt,reformer,rembert,roberta,roberta-prelayernorm,"
    "roc_bert,roformer,rwkv,xlm,xlm-roberta,xlm-roberta-xl,xmod"
).split(",")


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """Ids [2, 40], longer than the windows."""
    return torch.randint(2, 120, (2, WINDOW + 16), generator=torch.Generator().manual_seed(3))


def model_of(name: str) -> Any:
    """The zoo's, or a longer one."""
    overrides = dict(num_hidden_layers=4) | LONGER[name] if name in LONGER else {}
    try:
        return tiny_model(name, "sdpa", **overrides)
    except ValueError:  # families without that implementation
        return tiny_model(name, **overrides)


@contextmanager
def outputs_of(layers: list[nn.Module]) -> Iterator[list[list[Any]]]:
    """What each layer returns within, a list to a layer."""
    found: list[list[Any]] = [[] for _ in layers]
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, made=made: made.append(output))
        for layer, made in zip(layers, found, strict=True)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def check_states(model: nn.Module, tokens: torch.Tensor) -> None:
    """Outputs of all blocks are the model's own to the bit, also those of a second run, and so are the logits."""
    blocks = list(decoder_blocks(model))
    with torch.no_grad(), outputs_of(blocks) as own:
        logits = [model(input_ids=sample.unsqueeze(0), use_cache=False).logits for sample in tokens]
    hidden = first_inputs(model, tokens)
    for block, made in zip(blocks, own, strict=True):
        run_block(block, hidden)
        hidden = run_block(block, hidden)
        for known, expected in zip(hidden.before, made, strict=True):
            assert torch.equal(main_output(known.output), main_output(expected))
    for sample, known, expected in zip(tokens, hidden.before, logits, strict=True):
        with torch.no_grad():
            assert torch.equal(logits_after(model, known.output, sample.unsqueeze(0)), expected)


def check_gradients(model: nn.Module, tokens: torch.Tensor) -> None:
    """Squared gradients are those of the model's plain backward."""
    actual = output_sensitivity(model, tokens)
    layers = {name: model.get_submodule(name) for name in actual}
    assert actual or not [layer for block in decoder_blocks(model) for layer in linear_layers(block)]
    total = {name: torch.zeros_like(squares) for name, squares in actual.items()}
    for sample in tokens:
        with outputs_of(list(layers.values())) as found:
            logits = model(input_ids=sample.unsqueeze(0), use_cache=False).logits[0, :-1].float()
        outputs = [(name, output) for name, made in zip(layers, found, strict=True) for output in made]
        loss = F.cross_entropy(logits, sample[1:], reduction="sum")
        gradients = torch.autograd.grad(loss, [output for _, output in outputs], allow_unused=True)
        for (name, _), gradient in zip(outputs, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.double().flatten(0, -2).square().sum(0)
    for name, squares in actual.items():
        torch.testing.assert_close(squares, total[name] / tokens.numel(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", BUILT)
def test_every_family_is_walked_as_it_runs_itself(name: str, tokens: torch.Tensor) -> None:
    model = model_of(name)
    if name in ELSEWHERE:
        with pytest.raises(ValueError, match=r"keeps no decoder blocks in model\.layers"):
            list(first_inputs(model, tokens).samples)
        return
    check_states(model, tokens)


@pytest.mark.parametrize("name", LONGER)
def test_layers_of_several_types(name: str, tokens: torch.Tensor) -> None:
    model = model_of(name)
    check_states(model, tokens)
    check_gradients(model, tokens)


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text", "qwen3_5_text", "qwen3_next", "zaya"])
def test_a_compensation_of_full_rank_is_the_original(name: str, tokens: torch.Tensor) -> None:
    """Each block is run twice to be measured, and once more for what it gives the next."""
    original = model_of(name)
    quantized = copy.deepcopy(original)
    layers = [layer for block in decoder_blocks(quantized) for layer in linear_layers(block).values()]
    with torch.no_grad():
        for layer in layers:
            weight = layer.get_parameter("weight")
            step = float(weight.abs().max()) / 8
            weight.copy_((weight / step).round() * step)
    result = compensate(original, quantized, tokens, rank=512, dtype=torch.float32)
    added = {
        layer: (quantized.get_submodule(layer), pair.lora_b, pair.lora_a) for layer, pair in result.factors.items()
    }
    with torch.no_grad():
        expected, rounded = (model(tokens).logits for model in (original, quantized))
        with compensated(added):
            actual = quantized(tokens).logits
    assert (rounded - expected).norm() > 0.02 * expected.norm()
    assert (actual - expected).norm() < 1e-4 * expected.norm()


def test_a_block_that_is_given_what_is_long_gone_is_refused(tokens: torch.Tensor) -> None:
    """As in families that pass the outputs of many blocks on."""
    model = model_of("smollm3")
    blocks = list(decoder_blocks(model))
    first: list[Any] = []
    blocks[0].register_forward_hook(lambda module, inputs, output: first.append(output))
    blocks[2].register_forward_pre_hook(
        lambda module, positional, named: (positional, named | {"skipped": first[-1]}), with_kwargs=True
    )
    hidden = first_inputs(model, tokens)
    for block in blocks[:2]:
        hidden = run_block(block, hidden)
    # Hooks run inside the call, so the first block's answer reaches the third one's arguments.
    own = blocks[2].forward
    blocks[2].forward = lambda positional, skipped, **named: own(positional, **named)
    assert len(first) > 2
    with pytest.raises(ValueError, match="gives block 2 what blocks long before it have made"):
        list(hidden.calls)
