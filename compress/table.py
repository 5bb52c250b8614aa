"""The report of a compensation as a person reads it."""

from collections import defaultdict
from pathlib import Path
from typing import Any


def print_compensation(report: dict[str, Any], output: Path) -> None:
    """On stdout: what the models are worth on unseen text, what each kind of layer lost and kept, and where it lies."""
    from rich.console import Console
    from rich.table import Table

    measured = report["report"]
    models = Table("on text for the report", "perplexity", "divergence from the original")
    for name in ("original", "quantized", "compensated"):
        row = measured[name]
        models.add_row(name, f"{row['perplexity']:.3f}", "–" if name == "original" else f"{row['divergence']:.4f} nats")
    layers = Table("layers", "number", "rank", "relative error before", "after")
    kinds: dict[str, list[dict[str, float]]] = defaultdict(list)
    for name, layer in report["layers"].items():
        kinds[name.rpartition(".")[2]].append(layer)
    for kind, members in kinds.items():
        ranks = [int(member["rank"]) for member in members]
        before, after = (sum(member[when] for member in members) / len(members) for when in ("before", "after"))
        shown = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"
        layers.add_row(kind, str(len(members)), shown, f"{before:.2%}", f"{after:.2%}")
    removed = measured["divergence_removed"]
    console = Console()
    console.print(layers)
    console.print(models)
    console.print(
        f"{measured['recovered']:.0%} of the divergence removed ({removed['mean']:.4f} nats, 95 % between "
        f"{removed['low']:.4f} and {removed['high']:.4f}); {report['adapter_bytes'] / 1e6:.1f} MB in {output}"
    )
