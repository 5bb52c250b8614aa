"""The cache on a CUDA device; run by `make gpu-check`."""

from typing import Any

import pytest
import torch

from longshadow.engine.shadowkv import ShadowKVCache, ShadowKVConfig
from longshadow.engine.shadowkv.storage import RowStore
from tests.engine.shadowkv.families import tiny_model
from tests.engine.shadowkv.test_cache import COMPRESSING, prompt


@pytest.mark.gpu
@pytest.mark.parametrize("stores", [{}, dict(value_dtype="int8", factor_dtype="int8"), dict(key_store="exact")])
def test_decoding_on_a_gpu_follows_the_cpu(stores: dict[str, Any]) -> None:
    config = ShadowKVConfig(**{**COMPRESSING, "segment_tokens": 64, **stores})
    logits = {}
    for device in ("cpu", "cuda"):
        model = tiny_model("llama").to(device)
        with ShadowKVCache.for_model(model, config) as cache, torch.no_grad():
            model(prompt(203, batch=2).to(device), past_key_values=cache)
            steps = [model(prompt(1, batch=2, seed=step).to(device), past_key_values=cache) for step in range(70)]
        logits[device] = torch.stack([step.logits for step in steps]).cpu()
        assert cache.memory().host_bytes > 0 and cache.memory().device_bytes > 0
    assert (logits["cuda"] - logits["cpu"]).abs().max() <= 1e-3 * logits["cpu"].abs().max()


@pytest.mark.gpu
def test_host_rows_are_pinned_to_their_exact_size_and_come_back() -> None:
    rows = torch.randn(1001, 8, 64, device="cuda", dtype=torch.bfloat16)
    store = RowStore(rows, host=True)
    [held] = store.tensors
    assert held.device.type == "cpu" and held.is_pinned() and held.untyped_storage().nbytes() == rows.nbytes
    index = torch.randint(1001, (77,), device="cuda")
    assert torch.equal(store.gather(index), rows[index])
