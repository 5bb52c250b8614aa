"""Weights of models that gptqmodel quantised, in the layers of each of its kernels that a CPU can run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from longshadow.cli import app
from longshadow.compress.formats import weight_of
from tests.compress.formats.conftest import RANK, VOCABULARY

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
    tokenizer().save_pretrained(made["original"])
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


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character of ASCII that can be seen."""
    vocabulary = {"<?>": 0} | {chr(31 + number): number for number in range(1, VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, [], unk_token="<?>")), unk_token="<?>")


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


@pytest.mark.parametrize("method", ["GPTQ", "AWQ"])
def test_the_commands(folders: dict[str, Path], tmp_path: Path, method: str) -> None:
    """On a folder, as transformers loads it; what gptqmodel prints does not get between the results."""
    sizes = ["--rank", str(RANK), "--sequence-length", "64", "--num-samples", "9"]
    original, adapter = str(folders["original"]), str(tmp_path / "adapter")
    report = told("compensate", original, "--quantized", str(folders[method]), "--output", adapter, *sizes)
    assert len(report["layers"]) == 2 * 7
    assert 0 < report["report"]["compensated"]["divergence"] < report["report"]["quantized"]["divergence"]
    assert told("adapter", "verify", adapter, "--base", str(folders[method]))["passed"]
    layers = told("adapter", "inspect", str(folders[method]), "--original", original)["layers"]
    assert {layer["format"] for layer in layers.values()} == {f"{method} int4 group 32"}
    # Scales that AWQ folded into norms are taken back; else all of a weight would be residual.
    assert any(layer["scaled"] for layer in layers.values()) is (method == "AWQ")
    assert all(0.03 < layer["residual"] < 0.2 for layer in layers.values())


def told(*arguments: str) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)
