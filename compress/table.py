"""The report of a compensation as a person reads it."""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longshadow.compress.report import PAGE, quality_rows, summary

if TYPE_CHECKING:
    from longshadow.compress.planning import Plan


def print_compensation(report: dict[str, Any], output: Path) -> None:
    """On stdout: what the models are worth on unseen text, what each kind of layer lost and kept, and where it lies."""
    from rich.console import Console
    from rich.table import Table

    models = Table("on text for the report", "perplexity", "divergence from the original, nats")
    for row in quality_rows(report):
        models.add_row(*row)
    layers = Table("layers", "number", "rank", "relative error before", "after")
    kinds: dict[str, list[dict[str, float]]] = defaultdict(list)
    for name, layer in report["layers"].items():
        kinds[name.rpartition(".")[2]].append(layer)
    for kind, members in kinds.items():
        ranks = [int(member["rank"]) for member in members]
        before, after = (sum(member[when] for member in members) / len(members) for when in ("before", "after"))
        shown = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"
        layers.add_row(kind, str(len(members)), shown, f"{before:.2%}", f"{after:.2%}")
    console = Console()
    console.print(layers)
    console.print(models)
    for method, divergence in report["selection"].items():
        chosen = ", chosen" if method == report["method"] else ""
        console.print(f"{method}: divergence {divergence:.4f} on text for the selection{chosen}")
    console.print(f"{summary(report)} It lies in {output}; see {output / PAGE}.")


def print_plan(plan: "Plan") -> None:
    """On stdout: what a run would take."""
    from rich.console import Console
    from rich.table import Table

    estimate = plan.estimate
    table = Table("a run would take", "", box=None)
    for name, number in (
        ("weights of the quantised model", estimate.quantized),
        ("weights of the original" + (", the rest on disk" if plan.original_on_disk else ""), estimate.original),
        ("inputs of two blocks, for all samples", estimate.states),
        ("the work on one block", estimate.block),
        ("or, before, gradients that outputs are weighed by", estimate.gradients),
        ("or, at the end, logits of both models", estimate.logits),
        ("memory in all, at most", estimate.memory),
        ("memory that it may take", plan.available),
        ("the adapter, on disk", estimate.adapter),
    ):
        table.add_row(name, f"{number / 1e9:,.2f} GB")
    table.add_row("time, roughly", f"{estimate.minutes:,} min")
    Console().print(table)
