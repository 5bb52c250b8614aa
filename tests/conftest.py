"""What tests share: two threads, no network, the demo model, poisoned buffers, the rule for GPU tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before transformers is imported anywhere.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from tests.skip_check import SkipCheck

if TYPE_CHECKING:
    from longshadow.models import LoadedModel

# Two cores: one for each worker of pytest-xdist, both for a run without workers.
NUM_THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
SKIPS = Path(__file__).parent / "skips.txt"

torch.set_num_threads(NUM_THREADS)

if not torch.cuda.is_available():
    # Triton reads it when it is imported; its kernels then run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--check-skips",
        action="store_true",
        help="fail when the skipped tests are not those of tests/skips.txt",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A worker of pytest-xdist sees a part of the tests; the process that started it sees all reports.
    if config.getoption("--check-skips") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipCheck(SKIPS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def smollm2() -> "LoadedModel":
    """SmolLM2-135M-Instruct with its tokenizer, in fp32 on the CPU; shared, so leave it as it is."""
    from longshadow.models import load_model

    return load_model("demo", dtype=torch.float32, device="cpu")


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what `torch.empty` and its kin return with NaN (integers: their largest value).

    A buffer that is read before it was written then shows in the result.
    """
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max)

    return poisoned
