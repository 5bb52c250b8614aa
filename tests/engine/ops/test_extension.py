"""The extension: built on demand, and what is said where it cannot be used."""

import builtins
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch

from longshadow.engine.ops import extension, nvcc
from longshadow.engine.ops.tables import RowKind
from tests.engine.ops.batches import random_batch
from tests.engine.ops.test_fetch_values import check, random_request

ROOT = Path(__file__).resolve().parents[3]
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh_answer() -> None:
    extension.why_not.cache_clear()


@pytest.fixture
def importing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Makes the import of the extension give a module, or raise an error."""

    def set_result(result: Any) -> None:
        def import_module(name: str) -> Any:
            assert name == "longshadow._C"
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(extension.importlib, "import_module", import_module)

    return set_result


def test_reasons_are_clear(importing: Callable[[Any], None]) -> None:
    importing(ModuleNotFoundError("No module named 'longshadow._C'", name="longshadow._C"))
    assert extension.why_not(CUDA) == "the extension longshadow._C is not built (make extension)"
    extension.why_not.cache_clear()
    importing(ImportError("undefined symbol: torch_library_impl"))
    reason = extension.why_not(CUDA)
    assert reason is not None and "undefined symbol" in reason and f"with torch {torch.__version__}" in reason


def test_the_device_is_asked(importing: Callable[[Any], None]) -> None:
    asked: list[int] = []
    importing(SimpleNamespace(device_error=asked.append))
    assert extension.why_not(torch.device("cuda", 1)) is None and asked == [1]
    old_driver = "CUDA driver version is insufficient for CUDA runtime version"
    importing(SimpleNamespace(device_error=lambda device: old_driver))
    assert str(extension.why_not(CUDA)).endswith(f"cannot run on this device: {old_driver}")


def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to `setup`."""
    captured: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: captured.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return captured


def test_nothing_is_compiled_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGSHADOW_BUILD_CUDA", raising=False)
    assert not {"ext_modules", "cmdclass"} & setup_arguments(monkeypatch).keys()
    monkeypatch.setenv("LONGSHADOW_BUILD_CUDA", "1")
    (built,) = setup_arguments(monkeypatch)["ext_modules"]
    assert built.name == "longshadow._C" and built.py_limited_api
    assert {ROOT / source for source in built.sources} == {*nvcc.cuda_sources(), nvcc.SOURCES / "bindings.cpp"}


def test_commands_name_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert nvcc.architectures_in("8.0;9.0a 10.0+PTX") == ("80", "90a", "100+PTX")
    command = nvcc.compile_command(Path("x.cu"), Path("x.o"), ["80", "90a", "100+PTX"])
    assert command[0] == str(tmp_path / "bin" / "nvcc") and "-DTORCH_TARGET_VERSION=0x020b000000000000" in command
    assert [part for part in command if part.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=[compute_100,sm_100]",
    ]


def test_without_nvcc_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvcc, "DEFAULT_HOME", tmp_path)
    assert str(nvcc.why_not()).startswith("there is no nvcc")
    monkeypatch.setattr(nvcc, "SOURCES", tmp_path / "csrc")
    assert nvcc.why_not() == "the CUDA sources are in a checkout or a source distribution only"


def test_reading_the_commands_needs_the_standard_library_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name.partition(".")[0] in sys.stdlib_module_names, f"{name} is imported"
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    runpy.run_path(str(ROOT / "engine" / "ops" / "nvcc.py"))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("kind", [RowKind.MODEL, RowKind.INT8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 80, 128, 192, 256])
def test_values_from_pinned_memory(
    head_dim: int, dtype: torch.dtype, kind: RowKind, backend: str, device: torch.device
) -> None:
    batch = random_batch([[9, 2, 30], [], [1], [630]], value_dim=head_dim, dtype=dtype, values=kind, device=device)
    check(batch, random_request(batch, num_slots=313, num_places=1067), kind, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_wrong_tensors_are_refused(backend: str, device: torch.device) -> None:
    scores = torch.rand(2, 3, 40, device=device)
    counts = torch.full((2,), 4, dtype=torch.int32, device=device)
    chosen = torch.zeros(2, 3, 5, dtype=torch.int32, device=device)
    top_chunks = torch.ops.longshadow.top_chunks_cuda
    for wrong, reason in [
        ((scores.double(), counts, chosen), "scores must be Float, not Double"),
        ((scores, counts.long(), chosen), "counts must be Int, not Long"),
        ((scores[:1], counts, chosen), r"counts must have the shape \[1\], not \[2\]"),
        ((scores.transpose(0, 1), counts[:1].expand(3), chosen), "must be contiguous"),
        ((scores, counts.cpu(), chosen), "counts must be on CUDA device 0"),
    ]:
        with pytest.raises(RuntimeError, match=f"top_chunks: .*{reason}"):
            top_chunks(*wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_misaligned_slots_are_refused(backend: str, device: torch.device) -> None:
    batch = random_batch([[5]], value_dim=32, dtype=torch.float16, device=device)
    request = random_request(batch, num_slots=4, num_places=9)
    shape = (*request.has_values.shape, 32)
    slots = torch.zeros(math.prod(shape) + 1, dtype=torch.float16, device=device)[1:].view(shape)
    with pytest.raises(RuntimeError, match="fetch_values: value_slots must begin at a multiple of 16 bytes"):
        torch.ops.longshadow.fetch_values_cuda(
            batch.table.segments, request.slot_chunks, request.places, 0, request.has_values, slots
        )
