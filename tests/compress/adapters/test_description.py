"""Numbers of an adapter, by kind of layer."""

import json
from pathlib import Path

import pytest
import torch

from longshadow.compress.adapters.description import describe
from longshadow.compress.adapters.files import save_adapter
from longshadow.compress.adapters.reading import read_adapter
from tests.compress.adapters.lora_files import factors_for, write_lora
from tests.tiny_models import tiny_model


def test_kinds(tmp_path: Path) -> None:
    layers = factors_for(tiny_model(), ranks=(4,), dtype=torch.bfloat16)
    report = {"layers": {name: {"rank": 4, "before": 0.1 + ("0" in name) / 10, "after": 0.05} for name in layers}}
    others = {"compensation_report.json": json.dumps(report)}
    save_adapter(tmp_path / "adapter", layers, base_model="some/Model", others=others)
    description = describe(read_adapter(tmp_path / "adapter"))
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(description.kinds) == kinds and description.unusual == () and description.base_model == "some/Model"
    down = description.kinds["down_proj"]
    assert (down.number, down.ranks, down.scales, down.dtypes) == (2, (4, 4), (1, 1), ("bfloat16",))
    # Two layers of 32 x 64, with factors of rank 4 in 16 bits.
    assert down.num_bytes == 2 * 4 * (32 + 64) * 2
    assert down.bits_per_weight == pytest.approx(16 * 4 * (32 + 64) / (32 * 64))
    assert down.error_before == pytest.approx(0.15) and down.error_after == pytest.approx(0.05)
    assert description.total.number == 14
    assert description.total.num_bytes == sum(kind.num_bytes for kind in description.kinds.values())


@pytest.mark.parametrize("report", [None, "{", "[]", '{"layers": 3}', '{"layers": {"x": {"before": null}}}'])
def test_no_report_and_foreign_ones(tmp_path: Path, report: str | None) -> None:
    folder = write_lora(tmp_path / "lora", factors_for(tiny_model(), ranks=(8,)))
    if report is not None:
        (folder / "compensation_report.json").write_text(report)
    assert describe(read_adapter(folder)).total.error_before is None


def test_what_is_unusual(tmp_path: Path) -> None:
    layers = factors_for(tiny_model(), ranks=(8,))
    doubled = describe(read_adapter(write_lora(tmp_path / "a", layers, lora_alpha=16)))
    assert doubled.unusual == ("its scale is 2, not 1",)
    name = next(iter(layers))
    uneven = write_lora(tmp_path / "b", layers, r=4, lora_alpha=4, rank_pattern={".*": 8}, base_model_name_or_path=None)
    assert describe(read_adapter(uneven)).unusual == ("it does not name its base model", "its scale is 0.5, not 1")
    mixed = write_lora(tmp_path / "c", layers, alpha_pattern={name: 4}, use_dora=True)
    told = describe(read_adapter(mixed)).unusual
    assert told == ("it rescales whole weights (DoRA)", "its layers have different scales, 0.5 to 1")


def test_ranks_without_alphas(tmp_path: Path) -> None:
    """What one writer of such adapters does: PEFT halves layers that it wrote for a scale of 1."""
    layers = factors_for(tiny_model(), ranks=(4, 8))
    ranks = {name: factors.rank for name, factors in layers.items()}
    folder = write_lora(tmp_path / "lora", layers, r=4, lora_alpha=4, rank_pattern=ranks)
    [told] = describe(read_adapter(folder)).unusual
    assert told == "its layers have different scales, 0.5 to 1 (rank_pattern without alpha_pattern)"
