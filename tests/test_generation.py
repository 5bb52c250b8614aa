"""Measured generations: what is counted, what Ctrl-C leaves, what the model keeps."""

import os
import signal
import sys

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, Gemma3TextModel

from longshadow.engine.shadowkv import ShadowKVConfig
from longshadow.generation import Generation, Sampling, full_cache_bytes, generate, key_width
from longshadow.models import LoadedModel
from tests.tiny_models import KEY_WIDTH, MAX_POSITIONS, NUM_LAYERS, tiny_model, tiny_tokenizer

COMPRESSED = ShadowKVConfig(budget_tokens=64, dense_threshold=0)


@pytest.fixture
def loaded() -> LoadedModel:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    return LoadedModel(name="tiny", model=model, tokenizer=tokenizer, max_positions=MAX_POSITIONS)


def run(
    loaded: LoadedModel,
    shadow: ShadowKVConfig | None,
    *,
    num_tokens: int = 600,
    sampling: Sampling | None = None,
    texts: list[str] | None = None,
    layers: list[tuple[int, int]] | None = None,
) -> Generation:
    prompt_ids = torch.randint(1, 250, (1, num_tokens), generator=torch.Generator().manual_seed(1))
    return generate(
        loaded,
        prompt_ids,
        sampling or Sampling(max_new_tokens=12),
        shadow=shadow,
        on_text=(texts if texts is not None else []).append,
        on_prefill=lambda *progress: layers.append(progress) if layers is not None else None,
    )


@pytest.mark.parametrize("shadow", [None, COMPRESSED], ids=["full", "shadowkv"])
def test_text_comes_in_pieces_and_is_all_there(loaded: LoadedModel, shadow: ShadowKVConfig | None) -> None:
    texts: list[str] = []
    generation = run(loaded, shadow, texts=texts)
    assert len(generation.tokens) == 12
    assert "".join(texts) == generation.text == loaded.tokenizer.decode(generation.tokens)
    assert generation.first_token_seconds is not None
    assert generation.first_token_seconds > 0
    assert generation.tokens_per_second is not None
    assert not generation.interrupted


def test_progress_goes_through_the_layers_once(loaded: LoadedModel) -> None:
    layers: list[tuple[int, int]] = []
    run(loaded, None, layers=layers)
    assert layers == [(done, NUM_LAYERS) for done in range(1, NUM_LAYERS + 1)]
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_sizes_beside_a_full_cache(loaded: LoadedModel) -> None:
    full, shadowkv = run(loaded, None), run(loaded, COMPRESSED)
    exact = 2 * NUM_LAYERS * KEY_WIDTH * (600 + 11) * 4
    assert full.full_cache_bytes == shadowkv.full_cache_bytes == exact
    assert (full.device_bytes, full.host_bytes, full.peak_bytes) == (exact, 0, exact)
    assert full.attended_fraction == 1
    assert shadowkv.attended_fraction < 0.5
    assert 0 < shadowkv.device_bytes < exact
    assert shadowkv.host_bytes > 0
    assert shadowkv.peak_bytes >= shadowkv.device_bytes + shadowkv.host_bytes


def test_full_cache_bytes_are_those_of_a_dynamic_cache() -> None:
    config = Gemma3TextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        Gemma3TextModel(config)(torch.ones(1, 50, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    # transformers keeps a window's tokens but one: the next token is the window's last
    assert full_cache_bytes(config, 50, 4) == held + 2 * (2 * key_width(config) * 4)


@pytest.mark.parametrize("shadow", [None, COMPRESSED], ids=["full", "shadowkv"])
def test_interrupt_keeps_what_was_generated(loaded: LoadedModel, shadow: ShadowKVConfig | None) -> None:
    whole = run(loaded, shadow)
    before = loaded.model.config._attn_implementation
    interrupted = interrupt_after(3, loaded, shadow)
    assert interrupted.interrupted
    assert interrupted.tokens == whole.tokens[:3]
    assert whole.text.startswith(interrupted.text.rstrip("\ufffd"))
    assert loaded.model.config._attn_implementation == before
    assert not any(module._forward_hooks for module in loaded.model.modules())


def interrupt_after(num_tokens: int, loaded: LoadedModel, shadow: ShadowKVConfig | None) -> Generation:
    """As Ctrl-C would: in a forward pass."""
    passes = 0

    def interrupt(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes > num_tokens:
            raise KeyboardInterrupt

    handle = loaded.model.model.norm.register_forward_hook(interrupt)
    try:
        return run(loaded, shadow)
    finally:
        handle.remove()


@pytest.mark.parametrize("shadow", [None, COMPRESSED], ids=["full", "shadowkv"])
def test_interrupt_while_reading(loaded: LoadedModel, shadow: ShadowKVConfig | None) -> None:
    generation = interrupt_after(0, loaded, shadow)
    assert generation.interrupted
    assert generation.tokens == []
    assert generation.text == ""
    assert generation.first_token_seconds is None
    assert generation.tokens_per_second is None


def test_sampling_repeats_with_its_seed(loaded: LoadedModel) -> None:
    def tokens(seed: int) -> list[int]:
        return run(loaded, None, sampling=Sampling(max_new_tokens=12, temperature=1.0, seed=seed)).tokens

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1, got 0"),
        ({"temperature": -1.0}, "at least 0 and finite, got -1.0"),
        ({"temperature": float("nan")}, "at least 0 and finite, got nan"),
        ({"top_p": 0.0}, "above 0 and at most 1, got 0.0"),
    ],
)
def test_sampling_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)  # type: ignore[arg-type]


class InterruptedDestructor:
    """A signal that arrives while an object is being destroyed: Python prints its exception and goes on."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))  # lets the interpreter notice the signal here


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("shadow", [None, COMPRESSED], ids=["full", "shadowkv"])
def test_ctrl_c_is_not_lost_in_a_destructor(loaded: LoadedModel, shadow: ShadowKVConfig | None) -> None:
    texts: list[str] = []
    whole = run(loaded, shadow, texts=texts)
    told: list[str] = []

    def on_text(text: str) -> None:
        told.append(text)
        if len(told) == 3:
            InterruptedDestructor()

    handler = signal.getsignal(signal.SIGINT)
    stopped = generate(
        loaded,
        torch.randint(1, 250, (1, 600), generator=torch.Generator().manual_seed(1)),
        Sampling(max_new_tokens=12),
        shadow=shadow,
        on_text=on_text,
        on_prefill=lambda *_: None,
    )
    assert stopped.interrupted
    assert told[:3] == texts[:3]
    assert stopped.tokens == whole.tokens[: len(stopped.tokens)]
    assert len(stopped.tokens) < len(whole.tokens)
    assert signal.getsignal(signal.SIGINT) is handler
