"""`longshadow compensate`: an adapter for a quantised model. Nothing heavy is imported up here."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from longshadow.cli_common import DType, log_to_stderr, user_errors
from longshadow.paths import check_output_folder
from longshadow.sizes import UNITS_HELP, parse_bytes


class Propagate(StrEnum):
    """What a block is given while it is calibrated."""

    sequential = "sequential"
    quantized = "quantized"
    original = "original"


class Method(StrEnum):
    """What a compensation of a rank minimises."""

    eora = "eora"
    diagonal = "diagonal"
    svd = "svd"
    fisher = "fisher"
    best = "best"


def compensate(
    original: Annotated[str, typer.Argument(help="The model before quantisation: hub id, folder, or `demo`.")],
    quantized: Annotated[str, typer.Option(help="The quantised model: hub id, folder, or FILE.gguf.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter; must not exist, or be empty.")],
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Make the quantised model first, in the folder of --quantized: nf4, int4:g64, int3:g64, 2:4."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of every layer. Default: the size of 32, spread by gain.")] = None,
    budget_mb: Annotated[
        float | None, typer.Option(help="Or the adapter's size, spread over layers by what it buys there.")
    ] = None,
    budget_bpw: Annotated[float | None, typer.Option(help="Or that, in bits per compensated weight.")] = None,
    uniform_rank: Annotated[
        bool, typer.Option("--uniform-rank", help="With a budget: the same rank everywhere, for runtimes that pad.")
    ] = False,
    method: Annotated[
        Method,
        typer.Option(
            help="`fisher` is EoRA with outputs weighed by gradients; `best` tries all on text set aside for that."
        ),
    ] = Method.fisher,
    shrinkage: Annotated[
        float, typer.Option(help="How far to move the activations' moments toward uncorrelated ones; 0 as published.")
    ] = 0.5,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Compensate the language-model head, too.")] = False,
    calibration: Annotated[
        str,
        typer.Option(
            help="Text, JSON (lines), CSV, Parquet, hf:NAME (a data set), or `builtin`: documentation of Python."
        ),
    ] = "builtin",
    calibration_column: Annotated[
        str | None, typer.Option(help="Of its rows. Default: text, messages, or prompt and completion.")
    ] = None,
    add_special_tokens: Annotated[
        bool, typer.Option(help="Begin each sample as the tokenizer begins a text, most often with BOS.")
    ] = True,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 512,
    num_samples: Annotated[int, typer.Option(help="Samples to calibrate on.")] = 64,
    propagate: Annotated[
        Propagate,
        typer.Option(
            help="What blocks are calibrated on: outputs of compensated blocks, of quantised ones, of the original's."
        ),
    ] = Propagate.sequential,
    dtype: Annotated[DType, typer.Option(help="Of the adapter.")] = DType.bfloat16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if any.")] = None,
    max_memory: Annotated[
        str | None, typer.Option(help=f"{UNITS_HELP}; the original stays on disk if need be. Default: what is free.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Win back quality that quantisation lost, as an ordinary LoRA adapter (EoRA).

    An interrupted run goes on where it was when the same command is given again.
    """
    with user_errors(debug):
        log_to_stderr()
        import torch

        from longshadow.compress.command import run_compensation
        from longshadow.compress.options import CompensationOptions
        from longshadow.compress.planning import plan_compensation
        from longshadow.compress.table import print_compensation, print_plan
        from longshadow.display import LayerBar

        output = check_output_folder(output, "--output")
        options = CompensationOptions(
            rank=rank,
            budget_mb=budget_mb,
            budget_bpw=budget_bpw,
            uniform_rank=uniform_rank,
            method=method.value,
            shrinkage=shrinkage,
            lm_head=lm_head,
            calibration=calibration,
            calibration_column=calibration_column,
            add_special_tokens=add_special_tokens,
            sequence_length=sequence_length,
            num_samples=num_samples,
            propagate=propagate.value,
            dtype=getattr(torch, dtype.value),
            max_memory=None if max_memory is None else parse_bytes(max_memory, "--max-memory"),
        )
        if quantize is not None:
            from longshadow.compress.quantize import quantization_config, quantize_model

            quantization_config(quantize)  # raises for what cannot be made
        if quantize is not None or dry_run:
            present = quantized if quantize is None else original  # of the size of what is yet to be made, at least
            plan = plan_compensation(original, present, output, options, device=device)
        if dry_run:
            if json_output:
                print(json.dumps(plan.to_dict()))
            else:
                print_plan(plan)
            return
        if quantize is not None:
            check_output_folder(Path(quantized), "--quantized")
            quantize_model(original, quantize, Path(quantized))
        with LayerBar("compensating") as bar:
            report = run_compensation(original, quantized, output, options, device=device, on_step=bar.update)
        if json_output:
            print(json.dumps(report))
        else:
            print_compensation(report, output)
