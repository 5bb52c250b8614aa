"""An adapter in a model without PEFT, for good."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from longshadow.compress.adapters.files import save_adapter
from longshadow.compress.adapters.installing import install_adapter, misfits
from longshadow.compress.adapters.reading import read_adapter
from longshadow.compress.solver import Factors
from tests.compress.adapters.lora_files import factors_for, with_products, write_lora
from tests.tiny_models import tiny_model


@torch.no_grad()
def test_the_model_computes_the_sum(tmp_path: Path) -> None:
    layers = factors_for(tiny_model(), ranks=(8,))
    alphas = {"q_proj": 4, r"layers\.1\.mlp.*": 16}
    adapter = read_adapter(write_lora(tmp_path / "lora", layers, alpha_pattern=alphas))
    scales = {name: 0.5 if "q_proj" in name else 2.0 if "layers.1.mlp" in name else 1.0 for name in layers}
    model, ids = tiny_model(), torch.arange(20)[None]
    before = model(ids).logits
    install_adapter(model, adapter, torch.float32)
    gc.collect()
    expected = with_products(tiny_model(), (layers, scales))(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=0.1)


@torch.no_grad()
def test_in_bfloat16(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", factors_for(tiny_model()), base_model="m")
    model = tiny_model().bfloat16()
    install_adapter(model, read_adapter(tmp_path / "adapter"), model.dtype)
    assert model(torch.arange(20)[None]).logits.dtype == torch.bfloat16


def test_another_model(tmp_path: Path) -> None:
    def square() -> Factors:
        return Factors(lora_b=torch.ones(32, 8), lora_a=torch.ones(8, 32))

    model = tiny_model()
    cases = {
        "it has no layer model.layers.9.mlp.up_proj": "model.layers.9.mlp.up_proj",
        "its model.layers.0.mlp is no linear layer but a LlamaMLP": "model.layers.0.mlp",
        "its model.layers.0.mlp.up_proj is [64, 32], the adapter's [32, 32]": "model.layers.0.mlp.up_proj",
    }
    for message, name in cases.items():
        good = "model.layers.0.self_attn.q_proj"
        adapter = read_adapter(write_lora(tmp_path / message[:12] / name, {good: square(), name: square()}))
        assert misfits(model, adapter) == [message]
        with pytest.raises(ValueError, match="is for another model"):
            install_adapter(model, adapter, torch.float32)
        assert not any(module._forward_hooks for module in model.modules()), "a part of it was installed"


def test_more_than_a_plain_adapter(tmp_path: Path) -> None:
    adapter = read_adapter(write_lora(tmp_path / "lora", factors_for(tiny_model(), ranks=(8,)), use_dora=True))
    with pytest.raises(ValueError, match="DoRA"):
        install_adapter(tiny_model(), adapter, torch.float32)


def test_layers_with_nothing_but_buffers(tmp_path: Path) -> None:
    class Packed(nn.Module):
        """A layer as GPTQ's: no parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 4, 3
            self.register_buffer("packed", torch.zeros(1, dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(*x.shape[:-1], 3)

    factors = Factors(lora_b=torch.randn(3, 8), lora_a=torch.randn(8, 4))
    adapter = read_adapter(write_lora(tmp_path / "lora", {"layer": factors}))
    model = nn.ModuleDict({"layer": Packed()})
    install_adapter(model, adapter, torch.float32)
    x = torch.randn(2, 4)
    torch.testing.assert_close(model["layer"](x).double(), x.double() @ factors.product.T, rtol=1e-5, atol=1e-5)


def test_peft_is_not_needed(tmp_path: Path) -> None:
    write_lora(tmp_path / "lora", factors_for(tiny_model(), ranks=(8,)))
    code = f"""
import sys
sys.modules["peft"] = None
import torch
from pathlib import Path
from longshadow.compress.adapters.installing import install_adapter
from longshadow.compress.adapters.reading import read_adapter
from tests.tiny_models import tiny_model
install_adapter(tiny_model(), read_adapter(Path({str(tmp_path / "lora")!r})), torch.float32)
print("installed")
"""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={"PYTHONPATH": f"{root / 'src'}:{root}", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "installed"
