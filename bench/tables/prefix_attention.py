"""Attention over a prefix tree, forward and backward, against the padded rows'."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.peak import PeakMemoryMeter
from bench.record import Check, Row
from bench.session import Session
from bench.synthetic import LLAMA_3_1_8B, num_threads
from bench.table import Column, Outcome, Table
from bench.timing import Candidate, paired_speedup, rates, time_interleaved
from longshadow import PrefixTree
from longshadow.engine.prefix_sharing.attention import choose_attention

SHAPE = LLAMA_3_1_8B
PADDED = "padded rows, SDPA"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """`rows` answers to each of `prompts` prompts."""

    prompts: int = 1
    prompt: int
    rows: int = 2
    response: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """Llama-3.1-8B's heads, one layer. `attentions` that the device cannot run are left out."""

    cells: tuple[Cell, ...]
    attentions: tuple[str, ...] = ("dense", "chains", "flex", "varlen")
    repeats: int = 20
    dtype: str = "bfloat16"
    threads: int = 2
    tolerance: float = 2e-2


def run(config: Config, session: Session) -> Outcome:
    """Each cell: padded rows and every implementation interleaved."""
    rows: list[Row] = []
    errors: list[float] = []
    with num_threads(config.threads):
        for cell in config.cells:
            session.progress(f"{cell.prompts} x {cell.rows} rows, prompt {cell.prompt:,}, answers {cell.response:,}")
            cell_rows, error = measure(cell, config, session)
            rows += cell_rows
            errors.append(error)
    check = Check(
        passed=max(errors) <= config.tolerance,
        max_error=max(errors),
        text="outputs and gradients of trees against those of padded rows, largest difference / largest entry = "
        f"{max(errors):.1e} (at most {config.tolerance:.0e})",
    )
    return Outcome(rows=rows, check=check)


def measure(cell: Cell, config: Config, session: Session) -> tuple[list[Row], float]:
    """The rows of one cell, and the largest error."""
    generator = torch.Generator().manual_seed(session.seed)
    prompts = torch.randint(1, 1000, (cell.prompts, cell.prompt), generator=generator).repeat_interleave(cell.rows, 0)
    answers = torch.randint(1000, (len(prompts), cell.response), generator=generator)
    answers[:, 0] = 1000 + torch.arange(len(prompts))  # so that each answer begins differently
    tree = PrefixTree.from_batch(torch.cat([prompts, answers], 1).to(session.device))
    kind: dict[str, Any] = dict(device=session.device, dtype=getattr(torch, config.dtype))
    heads = (SHAPE.num_query_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
    nodes = [torch.randn(1, count, tree.num_tokens, SHAPE.head_dim, **kind) for count in heads]
    padded = [tensor[0][:, tree.node_of].transpose(0, 1).contiguous() for tensor in nodes]
    weight = torch.randn(1, heads[0], tree.num_tokens, SHAPE.head_dim, **kind)
    padded_weight = _of_cells(weight, tree)
    scaling = SHAPE.head_dim**-0.5

    def over_rows() -> list[torch.Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in padded]
        output = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=scaling, enable_gqa=True)
        return [output, *torch.autograd.grad((output * padded_weight).sum(), leaves)]

    def over_tree(attention: str) -> list[torch.Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in nodes]
        attend = choose_attention(attention, leaves[0], dropout=0.0, softcap=None, sinks=None)
        output = attend(*leaves, tree, scaling=scaling)
        return [output, *torch.autograd.grad((output * weight).sum(), leaves)]

    able = {}
    for attention in config.attentions:
        try:
            choose_attention(attention, nodes[0].detach().requires_grad_(), dropout=0.0, softcap=None, sinks=None)
        except ValueError as reason:
            session.progress(str(reason))
        else:
            able[attention] = partial(over_tree, attention)
    expected = over_rows()
    error = max(_error(attend(), expected, tree) for attend in able.values())
    meters: dict[str, PeakMemoryMeter] = {}
    steps = {PADDED: over_rows, **able}

    def metered(name: str) -> None:
        with meters[name]:
            steps[name]()

    def renew(name: str) -> None:
        meters[name] = PeakMemoryMeter(session.device)

    timings = time_interleaved(
        {name: Candidate(run=partial(metered, name), prepare=partial(renew, name)) for name in steps},
        repeats=config.repeats,
        device=session.device,
    )
    visible = sum(
        (chain.stop - chain.start) * sum(stop - start for start, stop in chain.ancestors)
        + (chain.stop - chain.start) * (chain.stop - chain.start + 1) // 2
        for chain in tree.chains
    )
    length = cell.prompt + cell.response
    pairs = {PADDED: len(prompts) * length * (length + 1) // 2}
    rows: list[Row] = []
    for name, timing in timings.items():
        # Two products forward and five backward, of two operations for each visible pair, head and dimension.
        flops = 14 * pairs.get(name, visible) * SHAPE.num_query_heads * SHAPE.head_dim
        row: Row = {"prompts": cell.prompts, "prompt": cell.prompt, "rows": cell.rows, "response": cell.response}
        row |= {"method": name, "peak": meters[name].bytes, "ratio": pairs[PADDED] / visible}
        row |= timing.row() | rates(timing, flops=flops)
        row["speedup"] = paired_speedup(timings[PADDED], timing)
        rows.append(row)
    return rows, error


def _of_cells(nodes: torch.Tensor, tree: PrefixTree) -> torch.Tensor:
    """[1, H, T, D] to [N, H, L, D], each node shared out evenly among its cells."""
    counts = torch.bincount(tree.node_of.flatten(), minlength=tree.num_tokens).to(nodes.dtype)
    return (nodes[0] / counts[:, None])[:, tree.node_of].transpose(0, 1).contiguous()


def _error(actual: list[torch.Tensor], expected: list[torch.Tensor], tree: PrefixTree) -> float:
    """Outputs compared cell by cell; gradients of cells added up at their nodes."""
    errors = []
    for number, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        summed = torch.zeros_like(mine, dtype=torch.float32)
        cells = theirs.float().transpose(0, 1).flatten(1, 2)
        summed[0].index_add_(1, tree.node_of.flatten(), cells)
        if number == 0:
            summed /= torch.bincount(tree.node_of.flatten(), minlength=tree.num_tokens)[:, None]
        errors.append(float((mine.float() - summed).abs().max() / summed.abs().max()))
    return max(errors)


def _quick(config: Config) -> Config:
    return replace(config, cells=(Cell(prompt=64, response=16),), repeats=1)


TABLE: Table = Table(
    name="prefix_attention",
    title="Attention over shared prefixes",
    about="Llama-3.1-8B's heads (32 query, 8 KV heads of 128), one layer, forward and backward: causal attention of "
    "all rows with torch's SDPA, which chooses flash attention on a GPU, against attention over the prefix tree by "
    "each implementation. The ratio is that of query-key pairs that see each other. Operations count those pairs only.",
    configs={
        "cpu": Config(
            cells=(Cell(prompt=1024, response=128), Cell(prompt=1024, rows=8, response=128)),
            repeats=5,
            dtype="float32",
            tolerance=1e-4,
        ),
        "cuda": Config(
            cells=(
                Cell(prompt=1024, response=256, prompts=8),
                Cell(prompt=4096, response=256, prompts=4),
                Cell(prompt=16384, response=512),
                Cell(prompt=1024, rows=8, response=256, prompts=4),
            )
        ),
    },
    quick=_quick,
    columns=(
        Column(key="prompts", heading="prompts", unit="count"),
        Column(key="rows", heading="answers to each", unit="count"),
        Column(key="prompt", heading="prompt", unit="count"),
        Column(key="response", heading="answer", unit="count"),
        Column(key="method", heading="method"),
        Column(key="median", heading="median", unit="s"),
        Column(key="p20", heading="p20", unit="s"),
        Column(key="p80", heading="p80", unit="s"),
        Column(key="flops_per_s", heading="achieved", unit="flop/s"),
        Column(key="peak", heading="peak memory", unit="B"),
        Column(key="ratio", heading="pairs, padded over distinct", unit="x"),
        Column(key="speedup", heading="× padded rows", unit="x", speedup=True),
    ),
    targets=(),
    run=run,
)
