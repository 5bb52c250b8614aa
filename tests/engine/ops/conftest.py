"""Fixtures of the operators' tests; random batches are in `batches`, what results must fulfil in `checks`.

Without a GPU Triton's kernels run in its interpreter (tests/conftest.py switches it on), with one on the device.
"""

import pytest
import torch

from longshadow.engine.ops import splits
from longshadow.engine.ops.backend import why_not


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where operators are tested: the GPU where there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """ "triton", or what `@pytest.mark.parametrize("backend", [...], indirect=True)` says; skipped where impossible."""
    name: str = getattr(request, "param", "triton")
    reason = why_not(name, device)
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture
def few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels cut the work of a sequence and head into few parts: programs are interpreted slowly."""
    monkeypatch.setattr(splits, "TARGET_PROGRAMS", 8)
    monkeypatch.setattr(splits, "MINIMUM_CHUNKS", 32)
