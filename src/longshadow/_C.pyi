"""The compiled extension: importing it registers the CUDA C++ operators. It exists only where it was built."""

TORCH_VERSION: str  # of the torch whose headers it was built with; it runs with 2.11 and later
CUDA_VERSION: int  # of the toolkit, 1000 * major + 10 * minor

def device_error(device: int, /) -> str | None:
    """Why the kernels cannot run on a CUDA device, by its index; None where they can."""
