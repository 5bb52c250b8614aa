"""Predictions as a person reads them, and as programs do."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longshadow.engine.planning.advice import PREFILL_TOKENS, Prediction, Question, fastest
from longshadow.engine.shadowkv.config import ShadowKVConfig

if TYPE_CHECKING:
    from rich.table import Table

CAVEAT = (
    "Predicted, not measured: from bytes, operations and efficiencies fitted on one published run, for fused "
    "operators in a CUDA graph. On an A100 it is within 20% of most published numbers of the original; full "
    "attention is predicted 12% to 18% too slow there, so gains over it are overstated by about as much."
)


def print_comparison(question: Question, predictions: list[Prediction], model: str) -> None:
    """On stdout: a table, what it rests on, and the settings to use."""
    from rich.console import Console

    console = Console()
    console.print(to_table(question, predictions))
    console.print()
    for prediction in predictions:
        if prediction.slowest is not None:
            stage, share = prediction.slowest
            console.print(
                f"{_title(prediction)}: {share:.0%} of a step is {stage.name} ({stage.ceiling})", markup=False
            )
    console.print(f"\n{CAVEAT} Of a step's candidates, {question.hit_rate:.0%} are taken to be resident.\n")
    best = fastest(predictions)
    if not best.batch:
        console.print("Nothing fits: take a shorter context, a smaller batch, or a larger GPU.")
        return
    console.print(f"Predicted to be the fastest: {_title(best)}.")
    for line in settings(question, predictions, model):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def to_table(question: Question, predictions: list[Prediction]) -> "Table":
    """One row per way to run it, 80 characters wide."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"predicted: {escape(question.shape.name)} on {question.hardware.name}, {question.num_prompt_tokens:,} "
        f"+ {question.num_new_tokens:,} tokens, {'largest' if question.batch is None else 'given'} batch",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    table.add_column("", no_wrap=True)
    for heading in ("batch", "device GB", "host GB", "tokens/s", "each", "1st token"):
        table.add_column(heading, justify="right")
    for prediction in predictions:
        fits = prediction.batch > 0
        table.add_row(
            _title(prediction),
            f"{prediction.batch:,}" if fits else "none",
            f"{prediction.demand.device_bytes / 1e9:,.1f}",
            f"{prediction.demand.host_bytes / 1e9:,.1f}",
            f"{prediction.tokens_per_second:,.0f}" if fits else "–",
            f"{prediction.tokens_per_second / prediction.batch:,.1f}" if fits else "–",
            "–" if prediction.first_token_seconds is None else f"{prediction.first_token_seconds:,.2f} s",
        )
    return table


def settings(question: Question, predictions: list[Prediction], model: str) -> list[str]:
    """Lines that say how to get the fastest: its configuration, and the engine in Python.

    The command line keeps the default configuration, so its line is for that, where it fits.
    """
    best, name = fastest(predictions), model if Path(model).exists() else "MODEL"
    if not best.batch:
        return []
    lines = ["no ShadowKVConfig: none is predicted to be faster"]
    if best.config is not None:
        sizes = f"max_num_seqs={best.batch}, max_model_len={question.num_tokens}, max_prefill_tokens={PREFILL_TOKENS}"
        code = _as_code(best)
        lines = [f"configuration: {code}", f"in Python: LLM({name!r}, shadowkv={code}, {sizes})"]
    for prediction in predictions:
        if prediction.config == ShadowKVConfig() and prediction.batch:
            options = f"--max-num-seqs {prediction.batch} --max-model-len {question.num_tokens}"
            lines.append(f"command line, {prediction.name}: longshadow serve {name} {options}")
    return lines


def to_dict(question: Question, predictions: list[Prediction], model: str) -> dict[str, Any]:
    """For JSON."""
    best = fastest(predictions)
    return {
        "predicted": True,
        "note": CAVEAT,
        "model": question.shape.name,
        "gpu": question.hardware.name,
        "num_prompt_tokens": question.num_prompt_tokens,
        "num_new_tokens": question.num_new_tokens,
        "max_prefill_tokens": PREFILL_TOKENS,
        "hit_rate": question.hit_rate,
        "host_memory_bytes": question.host_memory_bytes,
        "predictions": [_as_dict(prediction) for prediction in predictions],
        "fastest": best.name if best.batch else None,
        "settings": settings(question, predictions, model),
    }


def _as_dict(prediction: Prediction) -> dict[str, Any]:
    return {
        "name": prediction.name,
        "fits": prediction.batch > 0,
        "batch": prediction.batch,
        **asdict(prediction.demand),
        "tokens_per_second": prediction.tokens_per_second,
        "first_token_seconds": prediction.first_token_seconds,
        "settings": _as_code(prediction),
        "stages": [asdict(stage) for stage in prediction.stages],
    }


def _title(prediction: Prediction) -> str:
    return prediction.name if prediction.config is None else f"ShadowKV, {prediction.name}"


def _as_code(prediction: Prediction) -> str | None:
    """The configuration without what is the default."""
    if prediction.config is None:
        return None
    config = prediction.config
    given = ((field.name, getattr(config, field.name), field.default) for field in fields(config))
    return f"ShadowKVConfig({', '.join(f'{name}={value!r}' for name, value, default in given if value != default)})"
