"""The compiled extension `longshadow._C`: whether it can serve a device, and why not."""

import functools
import importlib

import torch

NAME = "longshadow._C"


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why the operators in CUDA C++ cannot run on a CUDA device, None where they can; loads the extension."""
    try:
        extension = importlib.import_module(NAME)
    except ModuleNotFoundError:
        return f"the extension {NAME} is not built (make extension)"
    except ImportError as error:
        return f"the extension {NAME} cannot be loaded with torch {torch.__version__}, build it again: {error}"
    index = torch.cuda.current_device() if device.index is None else device.index
    reason: str | None = extension.device_error(index)
    return None if reason is None else f"the extension {NAME} cannot run on this device: {reason}"
