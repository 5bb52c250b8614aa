"""Weights of models that gptqmodel quantised, in the layers of each of its kernels that a CPU can run."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from longshadow.compress.formats import weight_of
from tests.compress.formats.conftest import VOCABULARY
from tests.tiny_models import tiny_tokenizer

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one, its default on two cores, it refuses to start
gptqmodel = pytest.importorskip(
    "gptqmodel", reason="gptqmodel wants a newer torch than the constraints; make test-formats"
)
pytestmark = pytest.mark.slow

KERNELS = {
    "GPTQ_TORCH": "GPTQ",
    "GPTQ_TORCH_ATEN": "GPTQ",
    "GPTQ_TORCH_FUSED": "GPTQ",
    "AWQ_TORCH": "AWQ",
    "AWQ_TORCH_ATEN": "AWQ",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM) -> dict[str, Path]:
    """The model, and what gptqmodel makes of it by GPTQ and by AWQ."""
    parent = tmp_path_factory.mktemp("models")
    made = {name: parent / name for name in ("original", "GPTQ", "AWQ")}
    model.save_pretrained(made["original"])
    tiny_tokenizer().save_pretrained(made["original"])
    tokens = torch.randint(1, VOCABULARY, (32, 64), generator=torch.Generator().manual_seed(1)).tolist()
    samples = [dict(input_ids=row, attention_mask=[1] * len(row)) for row in tokens]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(parent)  # it writes logs where it runs
        for name, options in {"GPTQ": {}, "AWQ": dict(method="awq", format="gemm")}.items():
            config = gptqmodel.QuantizeConfig(bits=4, group_size=32, **options)
            quantized = gptqmodel.GPTQModel.load(str(made["original"]), config, device="cpu")
            quantized.quantize(samples, batch_size=4)
            quantized.save(str(made[name]))
    return made


def loaded(folder: Path, kernel: str) -> Any:
    backend = gptqmodel.BACKEND[kernel]
    return gptqmodel.GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.bfloat16).model


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel(agrees: Any, folders: dict[str, Path], kernel: str) -> None:
    method = KERNELS[kernel]
    layer = loaded(folders[method], kernel).model.layers[1].mlp.down_proj
    weight = agrees(layer, f"{method} int4 group 32", tolerance=0.01, probe=2.0**-8, dtype=torch.bfloat16)
    assert torch.equal(weight_of(layer), weight)  # now that it has run
    original = LlamaForCausalLM.from_pretrained(folders["original"]).model.layers[1].mlp.down_proj.weight
    assert 0.05 < float((weight - original).norm() / original.norm()) < 0.2


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_is_compensated(
    model: LlamaForCausalLM, is_compensated: Any, folders: dict[str, Path], kernel: str
) -> None:
    method = KERNELS[kernel]
    is_compensated(model, loaded(folders[method], kernel), f"{method} int4 group 32")
