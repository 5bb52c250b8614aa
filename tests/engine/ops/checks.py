"""What an operator's outputs are filled with before, and how exact they must be after."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CAPABILITIES = (80, 90, 100)
# Triton's interpreter multiplies matrices of bfloat16 by their bits.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if torch.cuda.is_available() else (torch.float32, torch.float16)
POISON = -7
ROOT = Path(__file__).resolve().parents[3]


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of NaN, of -7 where it holds ints: what an operator leaves unwritten shows."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else POISON, dtype=dtype, device=device)


def assert_as_exact(
    result: torch.Tensor, reference: torch.Tensor, expected: torch.Tensor, *, absolute: float = 1e-6
) -> None:
    """The error of `result` is at most twice that of the `reference`, PyTorch's in the same dtype.

    Errors are largest differences from `expected`, fp64; infinities must be at the same places.
    """
    infinite = expected.isinf()
    assert torch.equal(result.isinf(), infinite) and torch.equal(result[infinite].double(), expected[infinite])
    assert not result.isnan().any()
    errors = [(x.double() - expected).masked_fill(infinite, 0).abs() for x in (result, reference)]
    largest, allowed = (float(error.max()) if error.numel() else 0.0 for error in errors)
    assert largest <= 2 * allowed + absolute, f"error {largest:.3g}, PyTorch's in this dtype {allowed:.3g}"


def run_compiler(code: str) -> str:
    """Standard output of a fresh Python that runs `code` in the root, with triton's compiler, not its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT / 'src'}:{ROOT}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def check_that_it_compiles(operator: str, name: str) -> None:
    """Compiles one configuration of an operator's Triton kernels for every supported generation of devices."""
    pytest.importorskip("triton")
    code = f"""
from longshadow.engine.ops.configuration import SHARED_MEMORY, compile_ahead_of_time
from longshadow.engine.ops.{operator}.triton_kernel import CONFIGURATIONS
[configuration] = [found for found in CONFIGURATIONS if found.name == {name!r}]
for capability in {CAPABILITIES}:
    kernel = compile_ahead_of_time(configuration, capability)
    assert f".target sm_{{capability}}" in kernel.asm["ptx"] and len(kernel.asm["cubin"]) > 1000
    assert kernel.metadata.shared <= SHARED_MEMORY
    print(capability)
"""
    assert run_compiler(code).split() == [str(capability) for capability in CAPABILITIES]
