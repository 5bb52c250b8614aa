"""The `longshadow` command. Nothing heavy is imported before a command runs."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from longshadow.prompts import encode_prompt, read_document

if TYPE_CHECKING:
    import torch

    from longshadow.models import LoadedModel

USER_ERROR = 2
INTERRUPTED = 130
AUTO_RANK_ENERGY = 0.95

app = typer.Typer(
    help="Long contexts with small key-value caches; compensation of quantised models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class DType(StrEnum):
    """Number formats a model can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Propagate(StrEnum):
    """What a block is given while it is calibrated."""

    sequential = "sequential"
    quantized = "quantized"


@app.callback()
def _root() -> None:
    """Keeps `longshadow COMMAND` a group, whatever the number of commands."""


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Hub id, folder, FILE.gguf, or `demo` (SmolLM2-135M-Instruct).")],
    prompt_file: Annotated[str, typer.Option(help="UTF-8 text to read; - for standard input.")],
    question: Annotated[str | None, typer.Option(help="A question about the text.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Tokens selected per step and KV head: a share of the context such as 1.56%, or a number. "
            "Default: the larger of 1.56% and 512. A budget that covers the context runs dense."
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Rank of the key cache, or `auto` for the rank that keeps "
            f"{AUTO_RANK_ENERGY:.0%} of the keys' energy. Default: 160 or a third of the keys' width."
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run full attention too; show both.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, above 0 samples.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="When sampling: from the likeliest this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="When sampling: of the random numbers.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if any.")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Default: float32 on a CPU, as stored on a GPU.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Answer a question about a long text with a ShadowKV cache, and tell what it took."""
    with _user_errors(debug):
        _log_to_stderr()
        budget_tokens, budget_fraction = parse_budget(budget)
        fixed_rank = parse_rank(rank)

        document = read_document(prompt_file)

        from longshadow import ShadowKVConfig
        from longshadow.display import answer, print_report
        from longshadow.generation import Sampling
        from longshadow.models import load_model

        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        shadow = ShadowKVConfig(
            budget_tokens=budget_tokens,
            budget_fraction=budget_fraction,
            rank=fixed_rank,
            rank_energy=AUTO_RANK_ENERGY if rank == "auto" else None,
        )
        loaded = load_model(model, dtype=_torch_dtype(dtype), device=device)
        check_rank(fixed_rank, loaded)
        prompt_ids = encode_prompt(loaded.tokenizer, document, question)
        report = answer(loaded, prompt_ids, sampling, shadow, compare=compare, stream=not json_output)
        if json_output:
            print(json.dumps(report.to_dict()))
        else:
            print_report(report)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command()
def compensate(
    original: Annotated[str, typer.Argument(help="The model before quantisation: hub id, folder, or `demo`.")],
    quantized: Annotated[str, typer.Option(help="The quantised model: hub id, folder, or FILE.gguf.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter; must not exist, or be empty.")],
    rank: Annotated[int | None, typer.Option(help="Of every layer. Default: 32.")] = None,
    budget_mb: Annotated[
        float | None, typer.Option(help="Or the adapter's size, spread over layers by what it buys there.")
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="FILE.jsonl (column text), FILE.txt, or `builtin`: documentation of Python.")
    ] = "builtin",
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 512,
    num_samples: Annotated[int, typer.Option(help="Samples to calibrate on.")] = 64,
    propagate: Annotated[
        Propagate, typer.Option(help="What blocks are calibrated on: outputs of compensated blocks, or of plain ones.")
    ] = Propagate.sequential,
    dtype: Annotated[DType, typer.Option(help="Of the adapter.")] = DType.bfloat16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if any.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Win back quality that quantisation lost, as an ordinary LoRA adapter (EoRA)."""
    with _user_errors(debug):
        _log_to_stderr()
        import torch

        from longshadow.compress.command import CompensationOptions, run_compensation
        from longshadow.compress.table import print_compensation
        from longshadow.display import LayerBar

        options = CompensationOptions(
            rank=rank,
            budget_mb=budget_mb,
            calibration=calibration,
            sequence_length=sequence_length,
            num_samples=num_samples,
            propagate=propagate.value,
            dtype=getattr(torch, dtype.value),
        )
        with LayerBar("compensating") as bar:
            report = run_compensation(original, quantized, output, options, device=device, on_block=bar.update)
        if json_output:
            print(json.dumps(report))
        else:
            print_compensation(report, output)


@app.command()
def env(
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Print what a bug report needs: versions, devices, settings."""
    from longshadow.env import facts, report

    print(json.dumps(facts()) if json_output else report())


def parse_budget(text: str | None) -> tuple[int | None, float | None]:
    """`512` -> (512, None), `1.56%` -> (None, 0.0156), nothing -> (None, None).

    Raises:
        ValueError: it is neither, or out of range.
    """
    if text is None:
        return None, None
    message = (
        "--budget takes a share of the context such as 1.56% (above 0%, at most 100%) "
        f"or a number of tokens (1 or more), got {text!r}"
    )
    try:
        if text.endswith("%"):
            share = float(text.removesuffix("%")) / 100
            if 0 < share <= 1:
                return None, share
        elif int(text) >= 1:
            return int(text), None
    except ValueError as error:
        raise ValueError(message) from error
    raise ValueError(message)


def parse_rank(text: str | None) -> int | None:
    """A number from 1, or None for `auto` and nothing.

    Raises:
        ValueError: it is neither.
    """
    if text is None or text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--rank takes a number (1 or more) or auto, got {text!r}")
    return int(text)


def check_rank(rank: int | None, loaded: "LoadedModel") -> None:
    """Raises `ValueError` for a rank above the width of the model's keys."""
    from longshadow.generation import key_width

    width = key_width(loaded.model.config)
    if rank is not None and rank > width:
        raise ValueError(f"--rank must be between 1 and {width} (KV heads x head_dim) for this model, got {rank}")


def _torch_dtype(dtype: DType | None) -> "torch.dtype | None":
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def _log_to_stderr() -> None:
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("longshadow").setLevel(logging.INFO)


@contextmanager
def _user_errors(debug: bool) -> Iterator[None]:
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


if __name__ == "__main__":
    app()
