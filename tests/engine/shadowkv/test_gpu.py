"""The cache on a CUDA device; run by `make gpu-check`."""

from typing import Any

import pytest
import torch

from longshadow.engine.ops import operators
from longshadow.engine.ops.backend import why_not
from longshadow.engine.ops.tables import tensor_at
from longshadow.engine.shadowkv import DecodeGraphs, ShadowKVCache, ShadowKVConfig, graphed_decoding
from longshadow.engine.shadowkv.decode import StepCounts
from longshadow.engine.shadowkv.decode_batch import DecodeBatch
from longshadow.engine.shadowkv.segment import compress
from longshadow.engine.shadowkv.storage import RowStore
from longshadow.env import BACKEND_VARIABLE
from tests.engine.shadowkv.batches import SMALL, Setting, copies, decode_alone, decode_together
from tests.engine.shadowkv.families import tiny_model
from tests.engine.shadowkv.test_cache import COMPRESSING, generate, prompt

pytestmark = pytest.mark.gpu
SEGMENTS = dict(COMPRESSING, segment_tokens=64)
# A GPU finds a basis of lower rank by iteration: as good as the CPU's, but another.
FULL_RANK = dict(rank=None, rank_energy=1.0)
DEVICE = torch.device("cuda", 0)


def llama() -> Any:
    """A tiny model of a shape that kernels serve, on the GPU."""
    return tiny_model("llama", head_dim=32).to(DEVICE)


@pytest.mark.parametrize(
    "stores",
    [
        {},
        dict(value_dtype="int8", factor_dtype="int8"),
        dict(candidate_factor=1, resident_factor=2),
        dict(key_store="exact"),
        dict(value_store="device"),
    ],
)
@pytest.mark.parametrize("head_dim", [16, 32])  # decoded one by one, and by operators
def test_decoding_on_a_gpu_follows_the_cpu(stores: dict[str, Any], head_dim: int) -> None:
    config = ShadowKVConfig(**{**SEGMENTS, **FULL_RANK, **stores})
    logits = {}
    for device in ("cpu", "cuda"):
        model = tiny_model("llama", head_dim=head_dim).to(device)
        with ShadowKVCache.for_model(model, config) as cache, torch.no_grad():
            model(prompt(203, batch=2).to(device), past_key_values=cache)
            steps = [model(prompt(1, batch=2, seed=step).to(device), past_key_values=cache) for step in range(70)]
            operates = device == "cuda" and head_dim == 32 and "key_store" not in stores
            assert (cache.state.batch is not None) == operates
        logits[device] = torch.stack([step.logits for step in steps]).cpu()
        assert cache.memory().host_bytes > 0 or stores.get("value_store") == "device"
        assert cache.memory().device_bytes > 0
    tolerance = 3e-2 if "int8" in stores.values() else 1e-3
    assert (logits["cuda"] - logits["cpu"]).abs().max() <= tolerance * logits["cpu"].abs().max()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(
    "options", [{}, dict(candidate_factor=1), dict(value_dtype="int8", factor_dtype="int8"), dict(resident_factor=0)]
)
def test_a_batch_decodes_as_on_the_cpu(backend: str, options: dict[str, Any]) -> None:
    """The step by kernels, values in pinned host memory, against sequences decoded one by one on the CPU."""
    if (reason := why_not(backend, DEVICE)) is not None:
        pytest.skip(reason)
    config = ShadowKVConfig(**{**SMALL, **FULL_RANK, "resident_factor": 1, **options})
    settings = [Setting(config=config, device=device) for device in ("cpu", "cuda")]
    prompts = [[107], [38], [60, 512], [77, 60]]
    counts = StepCounts()
    alone = copies(settings[0].sequences(prompts), counts)
    together = copies(settings[1].sequences(prompts), counts)
    batch = DecodeBatch(operators(DEVICE, backend), config, DEVICE)
    tolerance = 3e-2 if "int8" in options.values() else 2e-3
    for _ in range(20):
        expected = decode_alone(settings[0], alone, [settings[0].new_tokens(4) for _ in alone])
        actual = decode_together(settings[1], batch, together, [settings[1].new_tokens(4) for _ in together])
        assert (actual.cpu() - expected).abs().max() <= tolerance * expected.abs().max()
    held = together[0][0].segments[0].values.tensors()["values"][0]
    assert held.device.type == "cpu" and held.is_pinned()


@pytest.mark.parametrize("candidate_factor", [1, 3])
def test_replays_equal_launches(candidate_factor: float) -> None:
    """Logits of every step, over tails that become segments, with a graph or several, and with none."""
    model = llama()
    config = ShadowKVConfig(**SEGMENTS, candidate_factor=candidate_factor)
    logits, statistics = [], []
    for graphed in (False, True):
        with ShadowKVCache.for_model(model, config) as cache, torch.no_grad():
            model(prompt(140, batch=3).to(DEVICE), past_key_values=cache)
            graphs, steps = DecodeGraphs(model, cache), []
            for step in range(140):
                ids = prompt(1, batch=3, seed=step).to(DEVICE)
                now = graphs.step(ids).clone() if graphed else model(ids, past_key_values=cache).logits
                steps.append(now)
            assert (graphs.num_graphs > 0) == graphed
            assert len(cache.layers[1].sequences[2].segments) == 3
        logits.append(torch.cat(steps, 1))
        statistics.append(cache.statistics())
    assert torch.equal(*logits)
    assert statistics[0] == statistics[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_generate_gives_the_same_tokens_with_graphs(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    ids = prompt(300, batch=2).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    tokens = []
    for graphed in (False, True):
        with ShadowKVCache.for_model(model, ShadowKVConfig(**SEGMENTS)) as cache:
            assert cache.state.batch is not None
            if graphed:
                with graphed_decoding(model, cache):
                    tokens.append(generate(model, ids, cache, tokens=80, attention_mask=mask))
            else:
                tokens.append(generate(model, ids, cache, tokens=80, attention_mask=mask))
    assert torch.equal(*tokens)


def test_a_prompt_is_compressed_as_on_the_cpu() -> None:
    """By the operator and the subspace iteration: landmarks, exact chunks, and keys of full rank."""
    setting = Setting(config=ShadowKVConfig(rank_energy=1.0))
    keys, values = (setting.random(2, 512, 32) for _ in range(2))
    rotation = setting.rotations(0, 0)(0, 512)
    assert rotation is not None
    segments = [
        compress(
            keys.to(device),
            values.to(device),
            rotation.to(device),
            setting.layout,
            setting.config,
            rank=64,
            key_weights=None,
            num_sink_chunks=1,
            num_outlier_chunks=4,
            operators=None if device.type == "cpu" else operators(device),
        )
        for device in (torch.device("cpu"), DEVICE)
    ]
    expected, actual = ([tensor.cpu() for tensor in segment.span(0, 64)] for segment in segments)
    assert torch.equal(segments[0].exact_chunks, segments[1].exact_chunks.cpu())
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=5e-3)
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(
        segments[1].landmarks.slice(0, 2).cpu(), segments[0].landmarks.slice(0, 2), rtol=0, atol=1e-4
    )


def test_memory_that_cannot_be_pinned_is_decoded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one notice, and the same logits."""
    model, config = llama(), ShadowKVConfig(**{**COMPRESSING, **FULL_RANK})
    logits = []
    for pins in (True, False):
        if not pins:
            monkeypatch.setattr("longshadow.engine.shadowkv.storage._pin", lambda owner, tensor: None)
        with ShadowKVCache.for_model(model, config) as cache, torch.no_grad():
            model(prompt(203).to(DEVICE), past_key_values=cache)
            logits.append(model(prompt(1, seed=5).to(DEVICE), past_key_values=cache).logits)
            assert (cache.state.batch is not None) == pins
    assert (logits[0] - logits[1]).abs().max() <= 1e-3 * logits[0].abs().max()


def test_backends_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = llama(), ShadowKVConfig(**SEGMENTS)
    logits = []
    for backend in ("reference", "triton", "cuda"):
        if why_not(backend, DEVICE) is not None:
            continue
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        with ShadowKVCache.for_model(model, config) as cache, torch.no_grad():
            model(prompt(203).to(DEVICE), past_key_values=cache)
            steps = [model(prompt(1, seed=step).to(DEVICE), past_key_values=cache).logits for step in range(5)]
        logits.append(torch.cat(steps))
    for other in logits[1:]:
        assert (other - logits[0]).abs().max() <= 1e-3 * logits[0].abs().max()


def test_kernels_read_pinned_host_memory_where_it_lies() -> None:
    rows = torch.randn(64, 8, 64, device=DEVICE)
    store = RowStore(rows, host=True)
    [held] = store.tensors
    assert held.is_pinned() and held.device.type == "cpu"
    assert torch.equal(tensor_at(held.data_ptr(), tuple(held.shape), held.dtype, DEVICE), rows)


def test_host_rows_are_pinned_to_their_exact_size_and_come_back() -> None:
    rows = torch.randn(1001, 8, 64, device="cuda", dtype=torch.bfloat16)
    store = RowStore(rows, host=True)
    [held] = store.tensors
    assert held.device.type == "cpu" and held.is_pinned() and held.untyped_storage().nbytes() == rows.nbytes
    index = torch.randint(1001, (77,), device="cuda")
    assert torch.equal(store.gather(index), rows[index])
