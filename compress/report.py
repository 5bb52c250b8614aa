"""What a run leaves beside the adapter: the report as JSON and as a page with a plot, and a model card."""

import base64
import html
import io
import json
import logging
from typing import Any

from longshadow.compress.adapters.runtimes import vllm_rank

REPORT = "compensation_report.json"
PAGE = "report.html"
PLOT = "error_per_layer.png"
CARD = "README.md"


logger = logging.getLogger(__name__)


def report_files(report: dict[str, Any]) -> dict[str, str | bytes]:
    """Contents of the files by their names; without the package matplotlib, no plot is among them."""
    files: dict[str, str | bytes] = {REPORT: json.dumps(report, indent=1) + "\n", CARD: model_card(report)}
    try:
        plot = error_plot(report["layers"])
        files[PLOT] = plot
    except ImportError:
        plot = None
        logger.info("the report has no plot, which needs matplotlib: pip install 'longshadow[plot]'")
    files[PAGE] = report_page(report, plot)
    return files


def error_plot(layers: dict[str, dict[str, float]]) -> bytes:
    """A PNG: every layer's error relative to its output, before and after, one panel per kind of layer."""
    from matplotlib.figure import Figure

    kinds: dict[str, list[dict[str, float]]] = {}
    for name, layer in layers.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(layer)
    num_columns = min(4, len(kinds))
    num_rows = -(-len(kinds) // num_columns)
    figure = Figure(figsize=(3.2 * num_columns, 2.6 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True).flatten()
    for panel, (kind, members) in zip(panels, kinds.items(), strict=False):
        for when, color in (("before", "#b0b0b0"), ("after", "#1f6feb")):
            panel.plot([100 * member[when] for member in members], color=color, marker=".", label=when)
        panel.set_title(kind, fontsize=10)
        panel.set_yscale("log")
        panel.set_xlabel("block")
        panel.grid(alpha=0.3)
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    panels[0].set_ylabel("error, % of the output")
    panels[0].legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def report_page(report: dict[str, Any], plot: bytes | None) -> str:
    """One HTML file that needs nothing else."""
    picture = (
        ""
        if plot is None
        else f"""<h2>Error per layer, before and after</h2>
<img alt="Error per layer before and after compensation" src="data:image/png;base64,{base64.b64encode(plot).decode()}">
"""
    )
    layers = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{layer['rank']:.0f}</td><td>{layer['before']:.3%}</td>"
        f"<td>{layer['after']:.3%}</td></tr>"
        for name, layer in report["layers"].items()
    )
    facts = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in _facts(report)
    )
    quality = "".join(
        f"<tr><td>{name}</td><td>{perplexity}</td><td>{divergence}</td></tr>"
        for name, perplexity, divergence in quality_rows(report)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Compensation of {html.escape(report["quantized"])}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }}
table {{ border-collapse: collapse; margin: 0 0 1.5rem }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #d8dee4 }}
td:not(:first-child) {{ font-variant-numeric: tabular-nums }}
img {{ max-width: 100% }}
</style></head><body>
<h1>Compensation of {html.escape(report["quantized"])}</h1>
<p>{html.escape(summary(report))}</p>
<table><tr><th>on text for the report</th><th>perplexity</th><th>divergence from the original, nats</th></tr>
{quality}</table>
{picture}<h2>Run</h2><table>{facts}</table>
<h2>Layers</h2>
<table><tr><th>layer</th><th>rank</th><th>error before</th><th>after</th></tr>{layers}</table>
</body></html>
"""


def model_card(report: dict[str, Any]) -> str:
    """A README.md as the Hugging Face hub shows it."""
    largest = max(int(layer["rank"]) for layer in report["layers"].values())
    rank = vllm_rank(largest) or largest
    rows = "\n".join(f"| {' | '.join(row)} |" for row in quality_rows(report))
    facts = "\n".join(f"- {key}: {value}" for key, value in _facts(report))
    return f"""---
base_model: {json.dumps(report["quantized"])}
library_name: peft
tags: [lora, quantization, eora]
---

# Compensation of {report["quantized"]}

A LoRA adapter that wins back quality which quantisation took from {report["original"]}
([EoRA](https://arxiv.org/abs/2410.21271)); it was computed, not trained. {summary(report)}

| on text for the report | perplexity | divergence from the original, nats |
| --- | --- | --- |
{rows}

```python
from peft import PeftModel
model = PeftModel.from_pretrained(model, "this folder", autocast_adapter_dtype=False)
```

With vLLM, where it serves the format of the base model: `--enable-lora --max-lora-rank {rank}`.

{facts}
"""


def quality_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, perplexity and divergence of the three models."""
    measured = report["report"]
    return [
        (
            name,
            perplexity_text(measured[key]["perplexity"]),
            "–" if key == "original" else f"{measured[key]['divergence']:.4f}",
        )
        for key, name in (("original", "original"), ("quantized", "quantised"), ("compensated", "with the adapter"))
    ]


def perplexity_text(perplexity: float | None) -> str:
    """For people; None is more than a number holds."""
    if perplexity is None:
        return "above 1e308"
    return f"{perplexity:.3f}" if perplexity < 1e6 else f"{perplexity:.3e}"


def summary(report: dict[str, Any]) -> str:
    """One sentence on what it bought."""
    measured = report["report"]
    removed = measured["divergence_removed"]
    interval = f", 95 % between {removed['low']:.4f} and {removed['high']:.4f}" if "low" in removed else ""
    one = measured["samples"] == 1
    samples = "1 sample that was" if one else f"{measured['samples']} samples that were"
    return (
        f"The adapter removes {measured['recovered']:.0%} of the quantised model's divergence from the original "
        f"({removed['mean']:.4f} nats{interval}, on {samples} not calibrated on), for "
        f"{report['adapter_bytes'] / 1e6:.1f} MB or {report['bits_per_weight']:.2f} bits per compensated weight."
    )


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    ranks = sorted({int(layer["rank"]) for layer in report["layers"].values()})
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    calibration = report["calibration"]
    return [
        ("original", report["original"]),
        ("quantised model", report["quantized"]),
        ("method", _method(report)),
        ("rank", shown),
        ("calibration", f"{calibration['samples']} x {report['sequence_length']} tokens of {calibration['text']}"),
        ("activations", report["propagate"]),
        *([("not compensated", _left_out(report["left_out"]))] if report["left_out"] else []),
        *((f"version of {name}", version) for name, version in report["versions"].items()),
    ]


def _method(report: dict[str, Any]) -> str:
    """With the shrinkage, where that changes anything."""
    method: str = report["method"]
    return f"{method}, shrinkage {report['shrinkage']:g}" if method in ("eora", "fisher") else method


def _left_out(experts: dict[str, Any]) -> str:
    return f"experts ({experts['num_weights']:,} weights, {experts['share']:.1%} of those in the blocks)"
