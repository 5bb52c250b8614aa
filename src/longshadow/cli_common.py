"""What all commands share: number formats, logging, and how a mistake ends. Nothing heavy is imported."""

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
INTERRUPTED = 130


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
    """Turns an error of the user into one line and exit code 2; `debug` lets the traceback through."""
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
        _exit_with(str(error))
    except (MemoryError, RuntimeError) as error:
        # torch's error for a full GPU, by name: importing torch for it would slow every command down
        if debug or not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"):
            raise
        _exit_with(f"out of memory ({error}); try a shorter text, --dtype bfloat16 or another --device")


def _exit_with(message: str) -> NoReturn:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(USER_ERROR) from None
