"""Steps that are prepared ahead of their launches, and whole models decoded by operators, against the ordinary way.

Without a GPU nothing is captured; everything else is as under a graph.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

from longshadow.engine.ops import Operators, SegmentTable
from longshadow.engine.shadowkv import ShadowKVCache, ShadowKVConfig
from longshadow.engine.shadowkv import state as state_module
from longshadow.engine.shadowkv.decode_batch import DecodeBatch
from longshadow.engine.shadowkv.graphs import DecodeGraphs, GraphedForward, graphed_decoding, why_not
from longshadow.env import BACKEND_VARIABLE
from tests.engine.shadowkv.families import tiny_model
from tests.engine.shadowkv.test_cache import COMPRESSING, EVERYTHING, all_tensors, generate, prompt

SEGMENTS = dict(COMPRESSING, segment_tokens=64)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture
def operated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators run, by their references."""
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")


def decode(model: Any, cache: Any, num_steps: int, batch: int = 2) -> torch.Tensor:
    """Logits of steps with given tokens, launched one by one."""
    with torch.no_grad():
        steps = [model(prompt(1, batch=batch, seed=step), past_key_values=cache).logits for step in range(num_steps)]
    return torch.cat(steps, 1)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize(
    ("family", "stores"),
    [
        ("llama", {}),
        ("llama", dict(candidate_factor=1, resident_factor=2)),
        ("phi", dict(value_dtype="int8", factor_dtype="int8")),
        ("glm4", {}),
        ("gpt_oss", dict(resident_factor=1)),
        ("cohere2", {}),
    ],
)
def test_operators_decode_like_pytorch(family: str, stores: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded batch through prompt, tokens, a later turn and tokens again."""
    model = tiny_model(family)
    mask = torch.ones(2, 131, dtype=torch.long)
    mask[0, :23] = 0
    logits, statistics = [], []
    for backend in (None, "reference"):
        if backend is not None:
            monkeypatch.setenv(BACKEND_VARIABLE, backend)
        with ShadowKVCache.for_model(model, ShadowKVConfig(**SEGMENTS, **stores)) as cache, torch.no_grad():
            assert (cache.state.batch is not None) == (backend is not None)
            model(prompt(131, batch=2), attention_mask=mask, past_key_values=cache)
            outputs = []
            for step, num_new in enumerate((1, 1, 61, 1, 1, 1, 1, 1, 1)):
                seen = torch.cat([mask, torch.ones(2, cache.get_seq_length() + num_new - 131, dtype=torch.long)], 1)
                positions = (seen.cumsum(1) - 1)[:, -num_new:]
                ids = prompt(num_new, batch=2, seed=step)
                outputs.append(model(ids, attention_mask=seen, position_ids=positions, past_key_values=cache).logits)
            logits.append(torch.cat(outputs, 1))
            statistics.append(cache.statistics())
            sequences = next(layer for layer in cache.layers if hasattr(layer, "sequences")).sequences
            assert [len(sequence.segments) for sequence in sequences] == [2, 2]
    assert close(logits[1], logits[0])
    assert statistics[0].attended_fraction == statistics[1].attended_fraction
    assert statistics[0].scored_fraction == statistics[1].scored_fraction
    assert statistics[1].hit_rate >= statistics[0].hit_rate


def test_steps_ahead_equal_ordinary_ones(llama: Any, operated: None) -> None:
    """Logits, compressed tokens and their rotations; then a later turn goes on from both alike."""
    config = ShadowKVConfig(**SEGMENTS)
    logits, later = [], []
    for ahead in (False, True):
        with ShadowKVCache.for_model(llama, config) as cache, torch.no_grad():
            llama(prompt(140, batch=2), past_key_values=cache)
            llama(prompt(50, batch=2, seed=50), past_key_values=cache)
            if ahead:
                graphs = DecodeGraphs(llama, cache)
                steps = [graphs.step(prompt(1, batch=2, seed=step)).clone() for step in range(15)]
                logits.append(torch.cat(steps, 1))
            else:
                logits.append(decode(llama, cache, 15))
            assert [len(sequence.segments) for sequence in cache.layers[1].sequences] == [2, 2]
            later.append(llama(prompt(9, batch=2, seed=99), past_key_values=cache).logits)
            later[-1] = torch.cat([later[-1], decode(llama, cache, 2)], 1)
    assert torch.equal(logits[0], logits[1]) and torch.equal(later[0], later[1])


def test_generate_decodes_ahead_and_leaves_no_trace(llama: Any, operated: None) -> None:
    mask = torch.ones(2, 130, dtype=torch.long)
    mask[1, :40] = 0
    tokens = []
    for graphed in (False, True):
        with ShadowKVCache.for_model(llama, ShadowKVConfig(**COMPRESSING)) as cache:
            if not graphed:
                tokens.append(generate(llama, prompt(130, batch=2), cache, attention_mask=mask))
                continue
            forward = llama.forward
            with graphed_decoding(llama, cache):
                assert llama.forward is not forward
                tokens.append(generate(llama, prompt(130, batch=2), cache, attention_mask=mask))
            assert llama.forward is forward
            assert cache.get_seq_length() == 141 and not cache.state.is_ahead
            assert torch.equal(cache.token_ids, tokens[1][:, :-1])
    assert "forward" not in vars(llama)
    assert torch.equal(*tokens)


def test_turns_and_beams_equal_the_stock_caches(llama: Any, operated: None) -> None:
    config = ShadowKVConfig(**EVERYTHING, resident_factor=1.5)
    for beams in ({}, dict(num_beams=3)):
        expected = generate(llama, prompt(130, batch=2), DynamicCache(config=llama.config), **beams)
        with ShadowKVCache.for_model(llama, config) as cache, graphed_decoding(llama, cache):
            ids = generate(llama, prompt(130, batch=2), cache, **beams)
            assert torch.equal(ids, expected)


def test_memory_is_the_sum_of_the_tensors_bytes(llama: Any, operated: None) -> None:
    with ShadowKVCache.for_model(llama, ShadowKVConfig(**COMPRESSING)) as cache, torch.no_grad():
        llama(prompt(130, batch=2), past_key_values=cache)
        decode(llama, cache, 3)
        held = [*(layer.sequences for layer in cache.layers), vars(cache.state.positions), vars(cache.state.batch)]
        held.append(vars(cache.tokens))
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in all_tensors(held, set())
        }
    assert cache.memory().total_bytes == sum(storage.nbytes() for storage in storages.values())


def test_kernels_decode_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", head_dim=32)
    logits = []
    for backend in ("auto", "triton"):
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        with ShadowKVCache.for_model(model, ShadowKVConfig(**COMPRESSING)) as cache, torch.no_grad():
            model(prompt(90, batch=2), past_key_values=cache)
            logits.append(decode(model, cache, 2))
    assert close(logits[1], logits[0])


def test_reset_and_short_prompts(llama: Any, operated: None) -> None:
    """One token alone is a prompt; prompts in chunks end with the first generated token."""
    config = ShadowKVConfig(**COMPRESSING, prefill_chunk_size=64)
    with ShadowKVCache.for_model(llama, config) as cache, graphed_decoding(llama, cache):
        first = generate(llama, prompt(1, batch=2), cache, tokens=4)
        assert cache.memory().device["decode step"] > 0
        cache.reset()
        assert cache.memory().total_bytes == 0
        assert torch.equal(generate(llama, prompt(1, batch=2), cache, tokens=4), first)
        cache.reset()
        with torch.no_grad():
            llama(prompt(64), past_key_values=cache)
            llama(prompt(64, seed=2), past_key_values=cache)
            assert cache.layers[1].sequences[0].parked is not None
            logits = llama(prompt(1, seed=3), past_key_values=cache).logits
        assert cache.layers[1].sequences[0].parked is None
    with ShadowKVCache.for_model(llama, ShadowKVConfig(**COMPRESSING)) as cache, torch.no_grad():
        llama(torch.cat([prompt(64), prompt(64, seed=2)], 1), past_key_values=cache)
        assert close(logits, llama(prompt(1, seed=3), past_key_values=cache).logits)


def test_why_a_step_is_an_ordinary_one(llama: Any, operated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShadowKVCache.for_model(llama, ShadowKVConfig()) as cache:
        assert why_not(llama, cache) is None
    with ShadowKVCache.for_model(llama, ShadowKVConfig(key_store="exact")) as cache:
        assert cache.state.batch is None and "operators do not run" in str(why_not(llama, cache))
    hybrid = tiny_model("gemma3_text")
    with ShadowKVCache.for_model(hybrid, ShadowKVConfig(**COMPRESSING)) as cache, torch.no_grad():
        assert "sliding windows" in str(why_not(hybrid, cache))
        hybrid(prompt(100), past_key_values=cache)
        graphs = DecodeGraphs(hybrid, cache)
        assert graphs.step(prompt(1)).shape == (1, 1, 128)
    scaled = tiny_model(
        "llama", rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4), max_position_embeddings=64
    )
    with ShadowKVCache.for_model(scaled, ShadowKVConfig()) as cache:
        assert "dynamic RoPE" in str(why_not(scaled, cache))


def test_storage_that_operators_cannot_read_is_decoded_one_by_one(
    llama: Any, operated: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the segment on that they cannot read, with one notice and as without operators."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(state_module.logger, "propagate", True)
    assign = SegmentTable.assign

    def refusing(self: Any, index: int, segments: Any, tail: Any = None) -> None:
        if len(segments) > 1:
            raise ValueError("values must be pinned")
        assign(self, index, segments, tail)

    monkeypatch.setattr(SegmentTable, "assign", refusing)
    logits = []
    for backend in ("reference", "auto"):
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        with ShadowKVCache.for_model(llama, ShadowKVConfig(**SEGMENTS)) as cache, torch.no_grad():
            llama(prompt(140, batch=2), past_key_values=cache)
            llama(prompt(56, batch=2, seed=50), past_key_values=cache)
            graphs = DecodeGraphs(llama, cache)
            logits.append(torch.cat([graphs.step(prompt(1, batch=2, seed=step)).clone() for step in range(8)], 1))
            assert cache.state.batch is None
            assert [len(sequence.segments) for sequence in cache.layers[1].sequences] == [2, 2]
    assert close(logits[0], logits[1])
    assert caplog.text.count("one by one: values must be pinned") == 1


def test_backends_of_the_environment(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "auto")
    with ShadowKVCache.for_model(llama) as cache:
        assert cache.state.batch is None
    monkeypatch.setenv(BACKEND_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="CUDA device"):
        ShadowKVCache.for_model(tiny_model("llama", head_dim=32))
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    with pytest.raises(ValueError, match=r"head_dim must be one of 32, .*the model has 16"):
        ShadowKVCache.for_model(llama)


# Arguments that the step itself makes, in memory of the graph: queries, keys, values, results.
OUT = 8
MADE_WITHIN = {
    "append_tokens": (0, 1),
    "score_tokens": (0, 1),
    "sparse_attention": (0, OUT),
    **dict.fromkeys(("top_chunks", "plan_chunks", "rebuild_keys", "fetch_values"), ()),
}


class LaunchesOnly(TorchDispatchMode):
    """Refuses what no CUDA graph can hold: reading numbers from the device, and bringing numbers to it."""

    REFUSED = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "lift_fresh", "_unique2")

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        assert function.overloadpacket.__name__ not in self.REFUSED, f"{function} within a step"
        return function(*arguments, **(keywords or {}))


def recording_operators(launches: list[tuple[Any, ...]]) -> Operators:
    """What is launched goes into the list, by name and addresses, instead of being computed."""

    def recorder(name: str) -> Any:
        def launch(*arguments: Any) -> None:
            kept = (x for index, x in enumerate(arguments) if index not in MADE_WITHIN.get(name, (0,)))
            launches.append((name, *(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in kept)))
            if name == "sparse_attention":
                arguments[OUT].zero_()

        return launch

    return Operators(**{part.name: recorder(part.name) for part in fields(Operators)})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "glm4", "olmo2", "granite"])
@pytest.mark.parametrize("candidate_factor", [1, 3])
def test_a_step_launches_the_same_operators_on_the_same_memory(
    family: str, candidate_factor: float, operated: None
) -> None:
    """As capturing it requires: nothing of the step depends on the tokens, their number, or where tails lie."""
    model = tiny_model(family)
    launches: list[tuple[Any, ...]] = []

    config = ShadowKVConfig(**COMPRESSING, candidate_factor=candidate_factor, resident_factor=1)
    recorders = recording_operators(launches)
    steps = []
    with ShadowKVCache.for_model(model, config) as cache, torch.no_grad():
        model(prompt(130, batch=2), past_key_values=cache)
        cache.state.batch = DecodeBatch(recorders, config, model.device)
        tail, buffer = cache.layers[0].sequences[0].tail, cache.layers[0].sequences[0].tail.tensors[0]
        for step in range(70):
            ids = prompt(1, batch=2, seed=step)
            positions = torch.full((2, 1), 130 + step)
            assert cache.state.begin_ahead(positions)
            launches.clear()
            with LaunchesOnly():
                model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
            cache.state.end_ahead()
            steps.append((cache.state.batch.signature, list(launches)))
        assert tail.tensors[0] is not buffer, "long enough that tails move"
    assert len({signature for signature, _ in steps}) == 1
    assert all(launched == steps[0][1] for _, launched in steps)
    assert len(steps[0][1]) == 2 * (7 if candidate_factor == 1 else 9)


def test_a_capture_that_fails_is_an_ordinary_step_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def full(*args: Any, **kwargs: Any) -> Iterator[None]:
        raise torch.OutOfMemoryError("no room for a graph")
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", full)
    graphed = GraphedForward(lambda ids, positions: (ids + positions).float(), torch.device("cpu"))
    graphed._captures = True
    ids = torch.tensor([[3]])
    for _ in range(2):
        assert graphed.run(ids, ids, (0, True)).item() == 6
    assert graphed.num_graphs == 0 and isinstance(graphed.failure, torch.OutOfMemoryError)
