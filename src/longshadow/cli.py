"""The `longshadow` command. Nothing heavy is imported before a command runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from longshadow.adapter_cli import adapter_app
from longshadow.batch_cli import check_ways, run_files
from longshadow.cli_common import INTERRUPTED, DType, log_to_stderr, torch_dtype, user_errors
from longshadow.compensate_cli import compensate
from longshadow.plan_cli import plan
from longshadow.prompts import encode_prompt, read_document
from longshadow.serve_cli import serve
from longshadow.shadowkv_options import Budget, KeyFormat, Rank, ValueFormat, check_model, shadowkv_config

app = typer.Typer(
    help="Long contexts with small key-value caches; compensation of quantised models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(compensate)
app.command()(serve)
app.command()(plan)
app.add_typer(adapter_app, name="adapter")


@app.callback()
def _root() -> None:
    """Keeps `longshadow COMMAND` a group, whatever the number of commands."""


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Hub id, folder, FILE.gguf, or `demo` (SmolLM2-135M-Instruct).")],
    prompt_file: Annotated[str | None, typer.Option(help="UTF-8 text to read; - for standard input.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="Many prompts instead: JSON lines with `prompt` or `messages`, and sampling parameters of their own.",
        ),
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="Results, in JSON lines; a run that was stopped goes on.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="A question about the text.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a LoRA adapter to add, such as a compensation.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    budget: Budget = None,
    rank: Rank = None,
    key_dtype: KeyFormat = None,
    value_dtype: ValueFormat = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run full attention too; show both.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token, above 0 samples. Default: the model's.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="When sampling: from the likeliest this probability. Default: the model's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="When sampling: of the random numbers.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if any.")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Default: float32 on a CPU, as stored on a GPU.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Answer a question about a long text with a ShadowKV cache, and tell what it took; or answer a file of prompts."""
    with user_errors(debug):
        log_to_stderr()
        check_ways(prompt_file, input_file, output_file, {"--question": question is not None, "--compare": compare})

        shadow = shadowkv_config(budget, rank, key_dtype, value_dtype)
        document = None if prompt_file is None else read_document(prompt_file)

        from longshadow.compress.adapters.installing import with_adapter
        from longshadow.compress.adapters.reading import read_adapter
        from longshadow.display import answer, print_report
        from longshadow.generation import Sampling
        from longshadow.models import load_model

        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        if input_file is not None and output_file is not None:
            batch_sampling = {
                "max_tokens": max_new_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "seed": seed,
            }
            run_files(
                input_file,
                output_file,
                model=model,
                adapter=adapter,
                shadowkv=shadow,
                sampling=batch_sampling,
                device=device,
                dtype=torch_dtype(dtype),
                json_output=json_output,
            )
            return
        assert document is not None
        lora = None if adapter is None else read_adapter(adapter)
        check_model(model, shadow)
        loaded = load_model(model, dtype=torch_dtype(dtype), device=device)
        if lora is not None:
            loaded = with_adapter(loaded, lora)
        prompt_ids = encode_prompt(loaded.tokenizer, document, question)
        report = answer(loaded, prompt_ids, sampling, shadow, compare=compare, stream=not json_output)
        if json_output:
            print(json.dumps(report.to_dict() | {"adapter": None if adapter is None else str(adapter)}))
        else:
            print_report(report)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command()
def env(
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Print what a bug report needs: versions, devices, settings."""
    from longshadow.env import facts, report

    print(json.dumps(facts()) if json_output else report())


if __name__ == "__main__":
    app()
