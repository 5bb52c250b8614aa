"""What a folder says about its layers, held to what PEFT makes of it, and one line for each fault."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longshadow.compress.adapters.files import save_adapter
from longshadow.compress.adapters.reading import read_adapter
from longshadow.compress.solver import Factors
from tests.compress.adapters.lora_files import factors_for, write_lora
from tests.tiny_models import tiny_model


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    layers = factors_for(tiny_model(), dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", layers, base_model="some/Model")
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.base_model == "some/Model" and adapter.rank == 5 and adapter.dtype == torch.bfloat16
    assert adapter.layers.keys() == layers.keys() and not adapter.oddities
    for name, expected in layers.items():
        layer, factors = adapter.layers[name], adapter.factors(name)
        assert (layer.rank, layer.scale) == (expected.rank, 1)
        assert (layer.num_outputs, layer.num_inputs) == expected.product.shape
        assert layer.num_bytes == expected.lora_a.nbytes + expected.lora_b.nbytes
        assert torch.equal(factors.lora_b, expected.lora_b) and torch.equal(factors.lora_a, expected.lora_a)
    adapter.require_plain()


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [
        ({}, {}),
        ({"q_proj": 2, "layers.1.mlp.up_proj": 4}, {}),
        # The first pattern that matches wins, and "k_proj" is not "my_k_proj".
        ({".*": 3, "q_proj": 2}, {r"model.layers.0.*_proj": 32, "q_proj": 1}),
        ({"_proj": 2}, {r"layers\.1\..*": 5, "down_proj": 7.5}),
    ],
)
def test_ranks_and_scales_are_pefts(
    tmp_path: Path, ranks: dict[str, int], alphas: dict[str, float], use_rslora: bool
) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra train")
    config = peft.LoraConfig(
        r=6,
        lora_alpha=9,
        target_modules="all-linear",
        rank_pattern=dict(ranks),
        alpha_pattern=dict(alphas),
        use_rslora=use_rslora,
    )
    peft.get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "adapter")
    # Loaded again: PEFT sorts the patterns when it saves them, and then another one may be the first that matches.
    model = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    found = {name: (layer.rank, layer.scale) for name, layer in adapter.layers.items()}
    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    assert found == expected and len(found) == 14


def test_folding_a_scale(tmp_path: Path) -> None:
    layers = factors_for(tiny_model(), ranks=(8,))
    adapter = read_adapter(write_lora(tmp_path / "lora", layers, lora_alpha=12))
    for name, factors in layers.items():
        found = adapter.folded(name, torch.float64)
        torch.testing.assert_close(found.product, 1.5 * factors.product, rtol=1e-12, atol=1e-12)


def test_factors_beyond_a_dtype(tmp_path: Path) -> None:
    layers = {"layer": Factors(lora_b=torch.full((4, 8), 60000.0), lora_a=torch.ones(8, 4))}
    adapter = read_adapter(write_lora(tmp_path / "lora", layers, lora_alpha=16))
    with pytest.raises(ValueError, match=r"layer: a factor does not fit the range of float16"):
        adapter.folded("layer", torch.float16)
    assert adapter.folded("layer", torch.float32).lora_b.max() == 120000


@pytest.mark.parametrize(
    ("config", "others", "field"),
    [
        ({"use_dora": True}, {"base_model.model.layer.lora_magnitude_vector": (4,)}, "use_dora"),
        ({}, {"base_model.model.layer.lora_magnitude_vector": (4,)}, "use_dora"),
        ({"bias": "lora_only"}, {"base_model.model.layer.bias": (4,)}, "bias"),
        ({"lora_bias": True}, {"base_model.model.layer.lora_B.bias": (4,)}, "lora_bias"),
        ({"modules_to_save": ["head"]}, {"base_model.model.head.weight": (4, 4)}, "modules_to_save"),
        ({}, {"base_model.model.embed.lora_embedding_A": (8, 4)}, "embeddings"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights"),
        ({"fan_in_fan_out": True}, {}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2], [1, 2]]}, {}, "layer_replication"),
    ],
)
def test_more_than_a_plain_adapter(
    tmp_path: Path, config: dict[str, Any], others: dict[str, tuple[int, ...]], field: str
) -> None:
    tensors = {key: torch.ones(shape) for key, shape in others.items()}
    layers = {"layer": Factors(lora_b=torch.ones(4, 8), lora_a=torch.ones(8, 4))}
    adapter = read_adapter(write_lora(tmp_path / "lora", layers, tensors, **config))
    assert [oddity.field for oddity in adapter.oddities] == [field]
    with pytest.raises(ValueError, match="no plain LoRA adapter"):
        adapter.require_plain()


@pytest.mark.parametrize("initialisation", [True, False, "gaussian", "eva"])
def test_initialisations_that_leave_the_base_alone(tmp_path: Path, initialisation: bool | str) -> None:
    layers = {"layer": Factors(lora_b=torch.ones(4, 8), lora_a=torch.ones(8, 4))}
    read_adapter(write_lora(tmp_path / "lora", layers, init_lora_weights=initialisation)).require_plain()


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder: Path, **values: torch.Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {**load_file(path), **{key.replace("__", "."): value for key, value in values.items()}}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


LAYER = "base_model__model__model__layers__0__self_attn__q_proj"
FAULTS = {
    "it has no adapter_config.json": lambda folder: (folder / "adapter_config.json").unlink(),
    "adapter_config.json is damaged": lambda folder: (folder / "adapter_config.json").write_text('{"r": 8'),
    "its peft_type is LOHA": lambda folder: change_config(folder, peft_type="LOHA"),
    "its peft_type is None": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "has no adapter_model.safetensors": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "but a pickle": lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
    "is damaged or incomplete": lambda folder: (folder / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()[:-100]
    ),
    "has rank 8 in its weights and 4 in": lambda folder: change_config(folder, r=4),
    "has rank 8 in its weights and 2 in": lambda folder: change_config(folder, rank_pattern={"q_proj": 2}),
    "r = 'eight', which is no such number": lambda folder: change_config(folder, r="eight"),
    "r = 0, which is no such number": lambda folder: change_config(folder, r=0),
    "lora_alpha = None, which is no such": lambda folder: change_config(folder, lora_alpha=None),
    "rank_pattern that is no mapping": lambda folder: change_config(folder, rank_pattern=[4]),
    "is no regular expression": lambda folder: change_config(folder, alpha_pattern={"q_proj(": 2}),
    "has no lora_A.weight": lambda folder: change_weights(folder, **{f"{LAYER}__lora_A__weight": None}),
    "has A [8, 32] and B [32, 7]": lambda folder: change_weights(
        folder, **{f"{LAYER}__lora_B__weight": torch.ones(32, 7)}
    ),
    "factors of type I64": lambda folder: change_weights(
        folder, **{f"{LAYER}__lora_A__weight": torch.ones(8, 32, dtype=torch.int64)}
    ),
    "in none of PEFT's forms": lambda folder: change_weights(
        folder, **{f"{LAYER}__lora_A__default__weight": torch.ones(8, 32)}
    ),
    "tensor layers.0.lora_A.weight": lambda folder: change_weights(folder, layers__0__lora_A__weight=torch.ones(8, 32)),
    "no factors of linear layers": lambda folder: save_file({}, folder / "adapter_model.safetensors"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults(tmp_path: Path, message: str) -> None:
    folder = write_lora(tmp_path / "lora", factors_for(tiny_model(), ranks=(8,)))
    read_adapter(folder)
    FAULTS[message](folder)
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is looked at below
        read_adapter(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        read_adapter(tmp_path / "nowhere")
