"""`longshadow adapter`: LoRA adapters of any origin, and what becomes of them. Nothing heavy is imported up here."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from longshadow.cli_common import CHECK_FAILED, DType, log_to_stderr, torch_dtype, user_errors
from longshadow.paths import check_output, check_output_folder
from longshadow.sizes import UNITS_HELP, parse_bytes

adapter_app = typer.Typer(help="Inspect, verify, evaluate, merge and export LoRA adapters.", no_args_is_help=True)

AdapterFolder = Annotated[Path, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.")]
BaseModel = Annotated[
    str | None, typer.Option("--base", help="The model it is for: hub id, folder, FILE.gguf, or `demo`.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Format(StrEnum):
    """What an adapter can be exported to."""

    gguf = "gguf"
    padded = "padded"
    merged = "merged"


@adapter_app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder, or, with --original, a quantised model's.")],
    original: Annotated[
        str | None, typer.Option(help="Look at a quantised model instead, beside this one before quantisation.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if any.")] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help=f"With --original, as 8GB ({UNITS_HELP}); it stays on disk if need be. Default: what is free."
        ),
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Tell what an adapter is (base, layers, ranks, scales, size).

    With --original, tell what quantisation did to a model's layers, and what compensating them would take.
    """
    with user_errors(debug):
        if original is not None:
            from longshadow.compress.inspection import inspect_quantized, print_inspection
            from longshadow.display import LayerBar

            limit = None if max_memory is None else parse_bytes(max_memory, "--max-memory")
            with LayerBar("inspecting") as bar:
                inspection = inspect_quantized(
                    original, str(adapter), device=device, max_memory=limit, on_block=bar.update
                )
            if json_output:
                print(json.dumps(inspection.to_dict()))
            else:
                print_inspection(inspection)
            return
        reason = "goes with --original: an adapter's own files are small"
        _refuse({"--max-memory": max_memory, "--device": device}, reason)
        from longshadow.compress.adapters.description import describe
        from longshadow.compress.adapters.reading import read_adapter
        from longshadow.compress.adapters.tables import print_description

        if (adapter / "config.json").is_file() and not (adapter / "adapter_config.json").is_file():
            raise ValueError(f"{adapter} is a model: to look at its quantisation, give the one before with --original")
        description = describe(read_adapter(adapter))
        if json_output:
            print(json.dumps(asdict(description)))
        else:
            print_description(description)


@adapter_app.command()
def verify(
    adapter: AdapterFolder,
    base: BaseModel = None,
    run: Annotated[
        bool, typer.Option("--run", help="Load both in the runtimes that are installed (PEFT, vLLM, llama.cpp), too.")
    ] = False,
    dtype: Annotated[DType | None, typer.Option(help="Of the base. Default: float32 on a CPU, else as stored.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if any.")] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Check an adapter's names, shapes, scales and numbers, and tell which runtimes serve it.

    With --base, load that too and compare PEFT's logits with those that the factors stand for. With --run, do so in
    the other runtimes that are installed, beside PEFT. Exit code 1: a check failed.
    """
    with user_errors(debug):
        log_to_stderr()
        if base is None and not run:
            _refuse({"--dtype": dtype, "--device": device}, "goes with --base or --run: without, no model is loaded")
        from longshadow.compress.adapters.bases import base_of, read_base
        from longshadow.compress.adapters.comparison import require_peft
        from longshadow.compress.adapters.reading import read_adapter
        from longshadow.compress.adapters.tables import print_verification
        from longshadow.compress.adapters.verification import known_base, verify_adapter
        from longshadow.models import load_model

        read = read_adapter(adapter)
        if base is None and not run:
            verification = verify_adapter(read, known_base(read))
        else:
            require_peft()
            known = base_of(read) if base is None else read_base(base)
            loaded = load_model(known.name, dtype=torch_dtype(dtype), device=device)
            verification = verify_adapter(read, known, loaded, run=run)
        if json_output:
            print(json.dumps(verification.to_dict()))
        else:
            print_verification(verification)
    if not verification.passed:
        raise typer.Exit(CHECK_FAILED)


@adapter_app.command()
def evaluate(
    adapter: AdapterFolder,
    original: Annotated[str, typer.Option(help="The model before quantisation: hub id, folder, or `demo`.")],
    quantized: Annotated[str, typer.Option(help="The quantised model that the adapter is for.")],
    text: Annotated[str, typer.Option(help="As --calibration of `compensate`; its report part.")] = "builtin",
    text_column: Annotated[str | None, typer.Option(help="As --calibration-column of `compensate`.")] = None,
    add_special_tokens: Annotated[bool, typer.Option(help="As for `compensate`.")] = True,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 512,
    num_samples: Annotated[int, typer.Option(help="As for calibration; a third of it is for the report.")] = 64,
    bits_per_weight: Annotated[
        float | None, typer.Option(help="Of the quantised layers, scales included, where it cannot be seen.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Benchmarks of lm-eval, too: names or YAML files, with commas between them.")
    ] = None,
    tasks_limit: Annotated[int | None, typer.Option(help="Examples of each task at most.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if any.")] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what an adapter is worth on unseen text, beside the same bytes spent on more bits."""
    with user_errors(debug):
        log_to_stderr()
        if tasks is None:
            _refuse({"--tasks-limit": tasks_limit}, "goes with --tasks: without, no benchmark is run")
        from longshadow.compress.adapters.evaluation import EvaluationText, evaluate_on_text, load_subject
        from longshadow.compress.adapters.tables import print_evaluation
        from longshadow.compress.adapters.tasks import Harness, Tasks
        from longshadow.compress.calibration import read_documents
        from longshadow.display import LayerBar

        names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
        harness = None if tasks is None else Harness(Tasks(names=names, limit=tasks_limit))
        source = EvaluationText(
            documents=read_documents(text, column=text_column),
            length=sequence_length,
            num_samples=num_samples,
            add_special_tokens=add_special_tokens,
        )
        subject = load_subject(adapter, original, quantized, bits_per_weight=bits_per_weight, device=device)
        with LayerBar("measuring", step="sample") as bar:
            report = evaluate_on_text(subject, source, on_sample=bar.update)
        if harness is not None:
            report["tasks"] = harness.run(subject.models(), subject.original.tokenizer)
        if json_output:
            print(json.dumps(report))
        else:
            print_evaluation(report)


@adapter_app.command()
def merge(
    adapter: AdapterFolder,
    other: Annotated[Path, typer.Argument(help="Another adapter for the same base, such as one you trained.")],
    output: Annotated[Path, typer.Option(help="Folder for the merged adapter; must not exist, or be empty.")],
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Make one adapter of two, which computes the sum of both: a compensation and a LoRA of your own."""
    with user_errors(debug):
        from longshadow.compress.adapters.merging import merge_adapters
        from longshadow.compress.adapters.reading import read_adapter
        from longshadow.report import format_bytes

        output = check_output_folder(output, "--output")
        merged = merge_adapters(read_adapter(adapter), read_adapter(other), output)
        if json_output:
            print(json.dumps(asdict(merged)))
            return
        print(
            f"{merged.output}: {merged.layers} layers ({merged.shared} of both) of rank {merged.rank} at most, "
            f"{format_bytes(merged.num_bytes)} in {merged.dtype}, for {merged.base_model or 'a base without a name'}"
        )
        if merged.other_base is not None:
            print(f"note: {other} names another base, {merged.other_base or 'none'}")


@adapter_app.command()
def export(
    adapter: AdapterFolder,
    to: Annotated[
        Format,
        typer.Option(
            help="gguf: a file for llama.cpp. padded: all layers of one rank, for runtimes without patterns. "
            "merged: the dense base with the adapter in its weights."
        ),
    ],
    output: Annotated[Path, typer.Option(help="File for gguf, folder otherwise; must not exist.")],
    base: BaseModel = None,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Default: float16 or float32 in gguf, the adapter's in padded, the base's in merged."),
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Write an adapter in another form. Where --base is left out, it is the one that the adapter names."""
    with user_errors(debug):
        log_to_stderr()
        if to is Format.padded:
            _refuse({"--base": base}, "goes with gguf and merged: padding needs the adapter alone")
        from longshadow.compress.adapters.reading import read_adapter
        from longshadow.report import format_bytes

        output = check_output(output, "--output")
        read, number = read_adapter(adapter), torch_dtype(dtype)
        if to is Format.padded:
            from longshadow.compress.adapters.padding import export_padded

            exported = export_padded(read, output, number)
        else:
            from longshadow.compress.adapters.bases import base_of, read_base
            from longshadow.compress.adapters.gguf_export import export_gguf
            from longshadow.compress.adapters.merged_export import export_merged

            write = export_gguf if to is Format.gguf else export_merged
            exported = write(read, base_of(read) if base is None else read_base(base), output, number)
        if json_output:
            print(json.dumps(asdict(exported)))
        else:
            size = format_bytes(exported.num_bytes)
            print(f"{exported.output}: {exported.layers} layers, {size} in {exported.dtype}; {exported.detail}")


def _refuse(options: dict[str, object], reason: str) -> None:
    """Raises ValueError for the first of the options that was given."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} {reason}")
