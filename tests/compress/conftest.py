"""Text that the tests of compensation calibrate on."""

import pytest
import torch

from tests.tiny_models import tiny_tokenizer


@pytest.fixture(scope="session")
def samples() -> torch.Tensor:
    """Token ids [8, 64]."""
    tokens = tiny_tokenizer()("A tall ship and a star to steer her by. " * 40)["input_ids"]
    return torch.tensor(tokens[: 8 * 64]).view(8, 64)
