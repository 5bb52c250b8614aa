"""Descriptions and verifications as a person reads them, on stdout."""

from typing import TYPE_CHECKING, Any

from longshadow.compress.adapters.description import Description, LayersDescription
from longshadow.compress.adapters.verification import Verification
from longshadow.compress.report import perplexity_text
from longshadow.report import format_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SERVES = {True: "yes", False: "no", None: "not known"}


def print_description(description: Description) -> None:
    """A row for each kind of layer, one for all, and what is unusual."""
    from rich.table import Table

    console = _console()
    base, dtypes = description.base_model or "a base that it does not name", ", ".join(description.total.dtypes)
    console.print(f"{description.folder}: for {base}, in {dtypes}", soft_wrap=True)
    columns = ["layers", "number", "rank", "scale", "size", "bits per weight"]
    has_errors = description.total.error_before is not None
    table = Table(*columns, *(["relative error before", "after"] if has_errors else []))
    for kind, layers in {**description.kinds, "all": description.total}.items():
        errors = [_percent(layers.error_before), _percent(layers.error_after)] if has_errors else []
        table.add_row(kind, *_cells(layers), *errors)
    console.print(table)
    for sentence in description.unusual:
        console.print(f"unusual: {sentence}", soft_wrap=True)


def print_verification(verification: Verification) -> None:
    """The checks, then a line for each runtime, which can be copied."""
    from rich.table import Table

    console = _console()
    table = Table("check", "result", "")
    for check in verification.checks:
        table.add_row(check.name, check.result, check.detail)
    console.print(table)
    for verdict in verification.runtimes:
        console.print(f"{verdict.runtime}: {SERVES[verdict.serves]}: {verdict.line}", soft_wrap=True)
        if verdict.ran is not None:
            console.print(f"  run here: {verdict.ran}", soft_wrap=True)


def print_evaluation(report: dict[str, Any]) -> None:
    """A row for each model, then the differences with their intervals."""
    from rich.table import Table

    console = _console()
    table = Table(f"on {report['samples']} samples of unseen text", "perplexity", "divergence from the original, nats")
    for name, row in report["rows"].items():
        table.add_row(name, perplexity_text(row["perplexity"]), f"{row['divergence']:.4f}")
    console.print(table)
    console.print(f"the adapter takes away {_interval(report['removed_by_adapter'])}", soft_wrap=True)
    bits = report["bits_per_weight"]
    if "rounding" in report:
        rounding = report["rounding"]
        console.print(
            f"same bytes as bits: rounded to {rounding['name']}, {rounding['bits_per_weight']:.2f} bits per weight for "
            f"{bits['quantised']:.2f} + {bits['adapter']:.2f}; the adapter leaves less by "
            f"{_interval(report['adapter_over_rounding'])}",
            soft_wrap=True,
        )
    elif bits["quantised"] is None:
        console.print("the size of the quantised weights cannot be seen: give --bits-per-weight", soft_wrap=True)
    if "tasks" in report:
        console.print(_task_table(report["tasks"]))


def _task_table(tasks: dict[str, Any]) -> "Table":
    from rich.table import Table

    limit = f", at most {tasks['limit']:,} examples of each" if tasks["limit"] else ""
    rows = [(task, metric, scores) for task, metrics in tasks["results"].items() for metric, scores in metrics.items()]
    names = list(dict.fromkeys(name for _, _, scores in rows for name in scores))
    table = Table("task", "metric", *names, title=f"lm-eval {tasks['lm_eval']}{limit}", title_justify="left")
    for task, metric, scores in rows:
        table.add_row(task, metric, *(_score(scores.get(name)) for name in names))
    return table


def _score(score: dict[str, float | None] | None) -> str:
    if score is None:
        return "–"
    return f"{score['value']:.4f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.4f}")


def _interval(difference: dict[str, float]) -> str:
    if "low" not in difference:
        return f"{difference['mean']:.4f} nats (one sample, which has no interval)"
    return f"{difference['mean']:.4f} nats (95 % between {difference['low']:.4f} and {difference['high']:.4f})"


def _console() -> "Console":
    from rich.console import Console

    # Names may have brackets, which rich would take for markup.
    return Console(markup=False, highlight=False)


def _cells(layers: LayersDescription) -> list[str]:
    return [
        str(layers.number),
        _range(*layers.ranks),
        _range(*layers.scales),
        format_bytes(layers.num_bytes),
        f"{layers.bits_per_weight:.2f}",
    ]


def _range(smallest: float, largest: float) -> str:
    return f"{smallest:g}" if smallest == largest else f"{smallest:g}–{largest:g}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"
