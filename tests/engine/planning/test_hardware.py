"""Names of accelerators and what follows from their figures."""

import pytest

from longshadow.engine.planning.hardware import A100, GPUS, H200, RTX_4090, find_hardware


@pytest.mark.parametrize("name", ["rtx-4090", "RTX 4090", "4090", "rtx4090"])
def test_names_are_forgiving(name: str) -> None:
    assert find_hardware(name) is RTX_4090


def test_every_name_is_found() -> None:
    assert all(find_hardware(name) is hardware for name, hardware in GPUS.items())
    assert find_hardware("A100") is find_hardware("a100-80gb") is A100


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'b300': known are a100, .* rtx-4090"):
        find_hardware("b300")


def test_formats_without_tensor_cores_run_in_bf16() -> None:
    assert A100.tensor_rate("fp8") == A100.tensor_rate("bf16") == 312e12
    assert H200.tensor_rate("fp8") > H200.tensor_rate("bf16") == 2 * H200.tensor_rate("tf32")
