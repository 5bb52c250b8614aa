"""The ceilings of a device, measured in the run whose rows are held against them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.cuda_graphs import captured, time_on_device
from bench.record import Row
from bench.timing import Timing, rates
from longshadow.engine.ops.tables import tensor_at
from longshadow.engine.shadowkv.storage import RowStore

COPY, MATMUL = "device copy, read + written", "bf16 matrix product"
ZERO_COPY, MEMCPY, LAUNCH = "host memory read by a kernel", "host memory by cudaMemcpy", "smallest kernel of a graph"


@dataclass(frozen=True, kw_only=True)
class CeilingSizes:
    """What they are measured with: bytes to copy, the matrices' side, kernels in a row."""

    num_bytes: int = 2**31
    side: int = 8192
    num_launches: int = 256


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Bytes/s of device memory (read + written) and of the link, operations/s, and seconds of the smallest kernel."""

    copy: float
    matmul: float
    link: float
    launch: float

    def floor(self, *, num_bytes: int, flops: int, over_link: bool) -> float:
        """Seconds below which the ceilings do not let a call come; bytes are the link's or device memory's."""
        return max(num_bytes / (self.link if over_link else self.copy), flops / self.matmul)


def measure_ceilings(sizes: CeilingSizes, device: str, *, repeats: int) -> list[Row]:
    """A row per ceiling."""
    count = sizes.num_bytes // 4
    source, target = (torch.ones(count, dtype=torch.int32, device=device) for _ in range(2))
    host = RowStore(source.view(1, 1, -1), host=True)
    visible = tensor_at(host.rows.data_ptr(), (count,), torch.int32, source.device)
    pinned = host.rows.view(-1)
    matrices = [torch.randn(sizes.side, sizes.side, device=device).bfloat16() for _ in range(2)]
    number = torch.zeros(1, device=device)

    def launch_in_a_row() -> None:
        for _ in range(sizes.num_launches):
            number.add_(1)

    def timed(run: Callable[[], object], calls: int = 1) -> Timing:
        return time_on_device(captured(run, device), device, repeats=repeats, calls=calls)

    memcpy = time_on_device(lambda: target.copy_(pinned, non_blocking=True), device, repeats=repeats)
    # An elementwise kernel with loads of 16 bytes; a copy between such tensors would be left to the copy engine.
    measured = {
        COPY: (timed(lambda: target.copy_(source)), dict(num_bytes=2 * sizes.num_bytes)),
        MATMUL: (timed(lambda: torch.matmul(*matrices)), dict(flops=2 * sizes.side**3)),
        ZERO_COPY: (timed(lambda: torch.bitwise_not(visible, out=target)), dict(num_bytes=sizes.num_bytes)),
        MEMCPY: (memcpy, dict(num_bytes=sizes.num_bytes)),
        LAUNCH: (timed(launch_in_a_row, sizes.num_launches), {}),
    }
    return [
        {"operator": "ceiling", "case": name, **timing.row(), **rates(timing, **amount)}
        for name, (timing, amount) in measured.items()
    ]


def ceilings_of(rows: list[Row]) -> Ceilings:
    """The numbers of `measure_ceilings`; the link's is the faster of its two."""
    by_name = {row["case"]: row for row in rows}
    return Ceilings(
        copy=by_name[COPY]["bytes_per_s"],
        matmul=by_name[MATMUL]["flops_per_s"],
        link=max(by_name[name]["bytes_per_s"] for name in (ZERO_COPY, MEMCPY)),
        launch=by_name[LAUNCH]["median"],
    )
