"""Ceilings of accelerators, from public data sheets.

Tensor cores: dense rates (where a sheet gives only the rate with structured sparsity, half of it).
- A100 80GB SXM, NVIDIA A100 data sheet: 2,039 GB/s; TF32 156, bf16 312 TFLOP/s, int8 624 TOP/s; PCIe 4.0.
- H100 SXM, NVIDIA H100 data sheet: 3.35 TB/s; TF32 494.5, bf16 989, fp8 1,979 TFLOP/s, int8 1,979 TOP/s; PCIe 5.0.
- H200 SXM, NVIDIA H200 data sheet: 4.8 TB/s; tensor cores and PCIe of the H100.
- L40S, NVIDIA L40S data sheet: 864 GB/s; TF32 183, bf16 362, fp8 733 TFLOP/s, int8 733 TOP/s; PCIe 4.0.
- RTX 4090, NVIDIA Ada architecture whitepaper, appendix A: 1,008 GB/s; with fp32 accumulation TF32 82.6, bf16 165.2,
  fp8 330.3 TFLOP/s, int8 660.6 TOP/s; PCIe 4.0.
Memory: what the driver reports as the total (nvidia-smi), 80 GB etc. on the sheets.
PCIe: sixteen lanes, one direction, 128b/130b coding: 31.5 GB/s (4.0), 63.0 GB/s (5.0).
Kernels: a short one takes 9.6 us when the host launches and awaits it, 3.4 us when a CUDA graph replays it
(A. Gray, "Getting Started with CUDA Graphs", NVIDIA Technical Blog, 2019; on a V100, 2.9 us of it execution).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Format = Literal["tf32", "bf16", "int8", "fp8"]
MEBIBYTE = 2**20
PCIE_4, PCIE_5 = 31.5e9, 63.0e9


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One accelerator and its link to the host.

    Attributes:
        memory_bytes: of the device.
        bandwidth: of device memory, bytes/s.
        tensor_rates: dense operations/s (two per multiply-add) by number format.
        link_bandwidth: host to device, bytes/s.
        launch_seconds: of a short kernel that the host launches.
        replay_seconds: of the same kernel in a CUDA graph.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    tensor_rates: Mapping[Format, float]
    link_bandwidth: float
    launch_seconds: float = 9.6e-6
    replay_seconds: float = 3.4e-6

    def tensor_rate(self, number_format: Format) -> float:
        """Operations/s; a format without tensor cores of its own is computed in bf16."""
        return self.tensor_rates.get(number_format, self.tensor_rates["bf16"])


HOPPER_RATES: Mapping[Format, float] = {"tf32": 494.5e12, "bf16": 989e12, "fp8": 1979e12, "int8": 1979e12}
A100 = Hardware(
    name="A100-80GB",
    memory_bytes=81_920 * MEBIBYTE,
    bandwidth=2039e9,
    tensor_rates={"tf32": 156e12, "bf16": 312e12, "int8": 624e12},
    link_bandwidth=PCIE_4,
)
H100 = Hardware(
    name="H100",
    memory_bytes=81_559 * MEBIBYTE,
    bandwidth=3350e9,
    tensor_rates=HOPPER_RATES,
    link_bandwidth=PCIE_5,
)
H200 = Hardware(
    name="H200",
    memory_bytes=143_771 * MEBIBYTE,
    bandwidth=4800e9,
    tensor_rates=HOPPER_RATES,
    link_bandwidth=PCIE_5,
)
L40S = Hardware(
    name="L40S",
    memory_bytes=46_068 * MEBIBYTE,
    bandwidth=864e9,
    tensor_rates={"tf32": 183e12, "bf16": 362e12, "fp8": 733e12, "int8": 733e12},
    link_bandwidth=PCIE_4,
)
RTX_4090 = Hardware(
    name="RTX 4090",
    memory_bytes=24_564 * MEBIBYTE,
    bandwidth=1008e9,
    tensor_rates={"tf32": 82.6e12, "bf16": 165.2e12, "fp8": 330.3e12, "int8": 660.6e12},
    link_bandwidth=PCIE_4,
)
GPUS = {"a100": A100, "a100-80gb": A100, "h100": H100, "h200": H200, "l40s": L40S, "rtx-4090": RTX_4090}


def find_hardware(name: str) -> Hardware:
    """By name, whatever its case: `h200`, `a100`, `RTX 4090`.

    Raises:
        ValueError: none is called that.
    """
    wanted = name.lower().replace(" ", "-").replace("_", "-")
    for known, hardware in GPUS.items():
        if wanted in (known, known.removeprefix("rtx-"), known.replace("-", "")):
            return hardware
    raise ValueError(f"no figures for a GPU {name!r}: known are {', '.join(GPUS)}")
