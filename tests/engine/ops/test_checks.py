"""Arguments that kernels would misread are refused."""

from collections.abc import Callable

import pytest
import torch

from longshadow.engine.ops.backend import implementation
from longshadow.engine.ops.checks import check_contiguous, check_query, check_workspace
from longshadow.engine.ops.score_chunks import score_chunks_workspace
from tests.engine.ops.batches import random_batch


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (lambda: check_contiguous(query=torch.zeros(2, 3).T), r"query must be contiguous, got strides \(1, 3\)"),
        (lambda: check_workspace(torch.zeros(9), 10), "10 elements or more, got torch.float32 with 9"),
        (lambda: check_workspace(torch.zeros(10).double(), 10), "must be torch.float32"),
        (lambda: check_query(torch.zeros(1, 1, 17, 32)), "1 to 16 query heads per KV head, got 17"),
    ],
)
def test_arguments_are_refused(check: Callable[[], None], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check()


def test_arguments_are_taken() -> None:
    check_contiguous(query=torch.zeros(2, 3), scores=torch.zeros(0))
    check_workspace(torch.zeros(10), 10)
    check_query(torch.zeros(1, 1, 16, 32))


@pytest.mark.parametrize("missing", [0, 1])
def test_an_operator_checks_its_arguments(missing: int, backend: str, device: torch.device) -> None:
    batch = random_batch([[9]], num_kv_heads=1, device=device)
    workspace = torch.zeros(score_chunks_workspace(1, 1, 2, 9) - missing, device=device)
    scores = torch.zeros(1, 1, 9, device=device)

    def run() -> None:
        score_chunks = implementation("score_chunks", backend, device)
        score_chunks(batch.query(2), batch.table.segments, 0.2, 0.0, 0, scores, workspace)

    if missing:
        with pytest.raises(ValueError, match="workspace must be"):
            run()
    else:
        run()
        assert float(scores.max()) > 0
