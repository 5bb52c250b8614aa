"""`longshadow plan`: what a model would take, and how fast it would be. Nothing heavy is imported, ever."""

import json
from typing import Annotated

import typer

from longshadow.cli_common import user_errors
from longshadow.engine.planning.implementation import PUBLISHED_HIT_RATE
from longshadow.sizes import UNITS_HELP, parse_bytes, parse_tokens


def plan(
    model: Annotated[str, typer.Option(help="A name such as llama-3.1-8b, or a config.json, or its folder.")],
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, l40s or rtx-4090.")],
    context: Annotated[str, typer.Option(help="Tokens of each prompt: 122k is 122 x 1,024.")],
    new_tokens: Annotated[int, typer.Option(help="Tokens that each sequence generates.")] = 512,
    batch: Annotated[int | None, typer.Option(help="Sequences at a time. Default: the largest that fits.")] = None,
    host_memory: Annotated[
        str | None, typer.Option(help=f"Of the machine, such as 128G; {UNITS_HELP}. Default: enough.")
    ] = None,
    hit_rate: Annotated[
        float,
        typer.Option(help="Share of a step's candidates that the step before had, too; the default is published."),
    ] = PUBLISHED_HIT_RATE,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Predict batch, memory and speed of full attention and of ShadowKV, and say which settings to use.

    Predictions come from a cost model, not from a run: no GPU and no weights are needed.
    """
    with user_errors(debug):
        from longshadow.engine.planning.advice import Question, compare
        from longshadow.engine.planning.hardware import find_hardware
        from longshadow.engine.planning.reading import read_shape
        from longshadow.engine.planning.table import print_comparison, to_dict

        question = Question(
            shape=read_shape(model),
            hardware=find_hardware(gpu),
            num_prompt_tokens=parse_tokens(context),
            num_new_tokens=new_tokens,
            batch=batch,
            host_memory_bytes=None if host_memory is None else parse_bytes(host_memory, "--host-memory"),
            hit_rate=hit_rate,
        )
        predictions = compare(question)
        if json_output:
            print(json.dumps(to_dict(question, predictions, model)))
        else:
            print_comparison(question, predictions, model)
