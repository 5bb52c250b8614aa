"""Which implementation runs: argument, then environment, then the best; impossible choices say why."""

import logging
from dataclasses import fields, replace

import pytest
import torch

from longshadow.engine.ops import backend as backends
from longshadow.engine.ops.backend import (
    Operators,
    Shapes,
    choose_backend,
    implementation,
    next_implementation,
    operators,
    why_not,
)
from longshadow.engine.ops.tables import RowKind

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
SHAPES = Shapes(num_groups=4, key_dim=128, value_dim=128, dtype=torch.float16)


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGSHADOW_BACKEND", raising=False)
    backends._best_backend.cache_clear()


@pytest.fixture
def gpu_without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, triton, and no extension."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(backends, "_is_interpreted", lambda: False)
    monkeypatch.setattr(backends.extension, "why_not", lambda device: "the extension is not built")


def test_every_operator_has_a_reference() -> None:
    found = operators(CPU, "reference")
    for field in fields(Operators):
        assert getattr(found, field.name).__module__ == f"longshadow.engine.ops.{field.name}.reference"


def test_every_operator_has_a_triton_kernel(device: torch.device, backend: str) -> None:
    found = operators(device, backend)
    for field in fields(Operators):
        assert getattr(found, field.name).__module__ == f"longshadow.engine.ops.{field.name}.triton_kernel"


def test_a_cpu_runs_the_reference_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_backend(CPU) == choose_backend(CPU, "auto") == "reference"
    assert not caplog.records


def test_argument_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSHADOW_BACKEND", "nonsense")
    assert choose_backend(CPU, "reference") == "reference"
    with pytest.raises(ValueError, match="must be one of auto, cuda, triton, reference, got 'nonsense'"):
        choose_backend(CPU)


def test_impossible_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_is_interpreted", lambda: False)
    implementation.cache_clear()
    for name in ("cuda", "triton"):
        with pytest.raises(ValueError, match=f"'{name}' cannot run on cpu: it needs a CUDA device"):
            choose_backend(CPU, name)
        with pytest.raises(ValueError, match=f"'{name}' cannot run on cpu: it needs a CUDA device"):
            implementation("score_chunks", name, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")
def test_the_interpreter_is_chosen_by_name_only(backend: str) -> None:
    assert choose_backend(CPU, "triton") == "triton"
    assert choose_backend(CPU) == "reference"
    assert "on the CPU" in str(why_not("triton", CUDA))


@pytest.mark.usefixtures("gpu_without_extension")
def test_auto_takes_the_best_possible_and_says_once_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_backend(CUDA) == choose_backend(CUDA) == "triton"
    assert [record.getMessage() for record in caplog.records] == [
        "operators on cuda:0 do without cuda: the extension is not built"
    ]


@pytest.mark.usefixtures("gpu_without_extension")
@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (replace(SHAPES, num_groups=17), "1 to 16 query heads per KV head, the model has 17"),
        (replace(SHAPES, key_dim=40), "head_dim must be one of 32, 64, 80, 96, 128, 192, 256, the model has 40"),
        (replace(SHAPES, value_dim=512), "the model has 512"),
        (replace(SHAPES, dtype=torch.float64), "the model is in float64"),
        (replace(SHAPES, factors=RowKind.FP8), "compute capability 8.9, the device has 8.0"),
    ],
)
def test_shapes_without_a_kernel_run_the_reference(shapes: Shapes, reason: str) -> None:
    assert choose_backend(CUDA, shapes=SHAPES) == "triton"
    assert choose_backend(CUDA, shapes=shapes) == "reference"
    with pytest.raises(ValueError, match=reason):
        choose_backend(CUDA, "triton", shapes)


@pytest.mark.usefixtures("gpu_without_extension")
def test_old_devices_run_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert choose_backend(CUDA) == "reference"
    assert why_not("triton", CUDA) == "it needs compute capability 8.0, the device has 7.5"


def test_operators_without_a_cuda_kernel_take_the_next(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(backends, "why_not", lambda name, device, shapes=None: None)
    _forget_implementations()
    try:
        assert implementation("score_chunks", "cuda", CPU).__module__.endswith("score_chunks.triton_kernel")
        assert implementation("plan_chunks", "cuda", CPU).__module__.endswith("plan_chunks.cuda_kernel")
        assert next_implementation("plan_chunks", "cuda", CPU).__module__.endswith("plan_chunks.triton_kernel")
    finally:
        _forget_implementations()


def test_without_triton_the_next_after_cuda_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_is_interpreted", lambda: False)
    _forget_implementations()
    try:
        assert next_implementation("plan_chunks", "cuda", CPU).__module__.endswith("plan_chunks.reference")
    finally:
        _forget_implementations()


def _forget_implementations() -> None:
    implementation.cache_clear()
    next_implementation.cache_clear()
