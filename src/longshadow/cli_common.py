"""What all commands share: number formats, logging, and how a mistake ends. Nothing heavy is imported."""

import errno
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    import torch

CHECK_FAILED = 1
USER_ERROR = 2
ENGINE_FAILED = 3
INTERRUPTED = 130
FULL_DISK = "free some space, or choose a folder on another disk, and give the command again"


class DType(StrEnum):
    """Number formats of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def torch_dtype(dtype: DType | None) -> "torch.dtype | None":
    """torch's own."""
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def log_to_stderr() -> None:
    """Messages of the package, as they come."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("longshadow").setLevel(logging.INFO)


@contextmanager
def user_errors(debug: bool) -> Iterator[None]:
    """Turns an error of the user into one line and exit code 2; `debug` lets the traceback through.

    An engine that failed has logged its traceback: one line and exit code 3.
    """
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader of our output went away, which typer handles
        raise
    except (ValueError, OSError) as error:
        if debug:
            raise
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        _exit_with(f"{error}; {FULL_DISK}" if is_full else str(error))
    except Exception as error:
        # By their names: importing torch and safetensors for them would slow every command down.
        kind = type(error).__name__
        if not debug and (isinstance(error, MemoryError) or kind == "OutOfMemoryError"):
            _exit_with(f"out of memory ({error}); try a shorter text, --dtype bfloat16 or another --device")
        if not debug and kind == "EngineDead":
            _exit_with(str(error), ENGINE_FAILED)
        # Damaged files are told as ValueError, so this is one that could not be written.
        if not debug and kind == "SafetensorError":
            _exit_with(f"a file cannot be written ({error}); {FULL_DISK}")
        raise


def _exit_with(message: str, code: int = USER_ERROR) -> NoReturn:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(code) from None
