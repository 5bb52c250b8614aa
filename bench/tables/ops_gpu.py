"""Every operator of the decode step and the prefill summary, by every backend, against the device's own ceilings."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from bench import ops
from bench.ceilings import Ceilings, CeilingSizes, ceilings_of, measure_ceilings
from bench.cuda_graphs import captured, time_on_device
from bench.ops.case import Case, Work
from bench.ops.top_chunks import TopChunks
from bench.record import Check, Row
from bench.session import Session
from bench.table import Column, Outcome, Table, Target
from bench.timing import Timing
from longshadow.engine.ops import operators as choose_operators
from longshadow.engine.ops.backend import BACKENDS, REFERENCE, why_not

SDPA, FLASH = "torch's SDPA over the same tokens", "flash-attn over the same tokens"
TOPK = "torch.topk, in no order"
ATTENTION = "sparse_attention"


@dataclass(frozen=True, kw_only=True)
class Config:
    """`changes` replaces fields of every case; `all_cases` False takes the first of each operator."""

    repeats: int = 21
    reference_repeats: int = 3
    backends: tuple[str, ...] = tuple(BACKENDS)
    ceilings: CeilingSizes = field(default_factory=CeilingSizes)
    changes: Mapping[str, Any] = field(default_factory=dict)
    all_cases: bool = True


def operator_modules() -> dict[str, ModuleType]:
    """The modules of `bench.ops` that describe an operator, by its name."""
    names = sorted(module.name for module in pkgutil.iter_modules(ops.__path__))
    modules = {name: importlib.import_module(f"bench.ops.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "cases")}


def run(config: Config, session: Session) -> Outcome:
    """The ceilings, then operator by operator and case by case; each case is a unit."""
    session.progress("ceilings")
    rows: list[Row] = session.unit(
        "ceilings", lambda: measure_ceilings(config.ceilings, session.device, repeats=config.repeats)
    )
    ceilings = ceilings_of(rows)
    rows, checks = list(rows), []
    for name, module in operator_modules().items():
        cases = module.cases() if config.all_cases else module.cases()[:1]
        for case in cases:
            session.progress(f"{name}: {case.name}")
            changed = replace(case, **config.changes)
            unit = session.unit(
                f"{name}, {case.name}", partial(measure, name, module, changed, ceilings, config, session)
            )
            rows += unit["rows"]
            checks += [Check(**check) for check in unit["checks"]]
    return Outcome(rows=rows, check=joined(checks))


def joined(checks: list[Check]) -> Check:
    """All of them, in one line: those that failed, or how many passed."""
    failed = [check.text for check in checks if not check.passed]
    errors = [check.max_error for check in checks if check.max_error is not None]
    return Check(
        passed=bool(checks) and not failed,
        max_error=max(errors, default=None),
        text="; ".join(failed) or f"{len(checks)} results of kernels against the reference's, each within its bound",
    )


def measure(
    name: str, module: ModuleType, case: Case, ceilings: Ceilings, config: Config, session: Session
) -> dict[str, Any]:
    """The rows of one case, a backend each, and the checks of all but the reference."""
    device = torch.device(session.device)
    work: Work = module.make(case, device, session.seed)
    timings: dict[str, Timing] = {}
    checks: list[Check] = []
    for backend in backends_of(name, config, device):
        chosen = choose_operators(device, backend)
        run = partial(work.run, chosen)
        if backend == REFERENCE:
            # It reads tables on the host, which no graph can.
            timings[backend] = time_on_device(
                run, session.device, repeats=config.reference_repeats, calls=work.num_layers
            )
            continue
        check = work.check(chosen)
        checks.append(replace(check, text=f"{name}, {case.name}, {backend}: {check.text}"))
        replay = captured(run, session.device)
        timings[backend] = time_on_device(replay, session.device, repeats=config.repeats, calls=work.num_layers)
    # Without kernels, on a CPU, the reference is held against itself: the cases' own checks run.
    if not checks:
        check = work.check(choose_operators(device, REFERENCE))
        checks.append(replace(check, text=f"{name}, {case.name}, {REFERENCE}: {check.text}"))
    over_link = bool(getattr(case, "on_host", False))
    num_bytes, flops = work.num_bytes // work.num_layers, work.flops // work.num_layers
    num_layers = work.num_layers
    if isinstance(work, TopChunks):
        timings[TOPK] = time_on_device(
            captured(work.run_topk, session.device), session.device, repeats=config.repeats, calls=num_layers
        )
    del work, run
    if name == ATTENTION:
        timings |= dense_attention(case, num_layers, config, session)
    rows = []
    for method, timing in timings.items():
        row: Row = {"operator": name, "case": case.name, "method": method, **timing.row(), "bytes": num_bytes}
        row |= {"bytes_per_s": num_bytes / timing.median, "flops_per_s": flops / timing.median}
        row["share"] = ceilings.floor(num_bytes=num_bytes, flops=flops, over_link=over_link) / timing.median
        row["launches"] = timing.median / ceilings.launch
        row["speedup"] = timings[REFERENCE].median / timing.median if REFERENCE in timings else None
        rows.append(row)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return {"rows": rows, "checks": [vars(check) for check in checks]}


def backends_of(name: str, config: Config, device: torch.device) -> list[str]:
    """Those that can run here and have an implementation of their own of this operator."""
    return [
        backend
        for backend in config.backends
        if why_not(backend, device) is None
        and importlib.util.find_spec(f"longshadow.engine.ops.{name}.{BACKENDS[backend]}") is not None
    ]


def dense_attention(case: Case, num_layers: int, config: Config, session: Session) -> dict[str, Timing]:
    """Plain attention over as many tokens as the case attends to, gathered beforehand, in as many layers."""
    num_tokens = (case.num_selected + case.num_exact_chunks) * case.chunk_size + case.tail_tokens
    kind: dict[str, Any] = dict(device=session.device, dtype=case.dtype)
    num_heads = case.num_kv_heads * case.num_groups
    query = torch.randn(case.batch_size, num_heads, 1, case.head_dim, **kind)
    caches = [
        torch.randn(2, case.batch_size, num_tokens, case.num_kv_heads, case.head_dim, **kind) for _ in range(num_layers)
    ]
    by_token = query.transpose(1, 2).contiguous()

    def sdpa() -> None:
        for keys, values in caches:
            F.scaled_dot_product_attention(
                query, keys.transpose(1, 2), values.transpose(1, 2), scale=case.scaling, enable_gqa=True
            )

    candidates: dict[str, Callable[[], object]] = {SDPA: sdpa}
    if session.device.startswith("cuda") and importlib.util.find_spec("flash_attn") is not None:
        attend = importlib.import_module("flash_attn").flash_attn_with_kvcache
        candidates[FLASH] = lambda: [attend(by_token, *cache, softmax_scale=case.scaling) for cache in caches]
    return {
        name: time_on_device(
            captured(candidate, session.device), session.device, repeats=config.repeats, calls=num_layers
        )
        for name, candidate in candidates.items()
    }


def _quick(config: Config) -> Config:
    return replace(
        config,
        repeats=3,
        ceilings=CeilingSizes(num_bytes=2**22, side=128, num_launches=4),
        changes=dict(context_tokens=2048, batch_size=2, tail_tokens=40, budget=0.125, working_set=1),
        all_cases=False,
    )


TABLE: Table = Table(
    name="ops_gpu",
    title="Operators against the ceilings of the device",
    about="Llama-3.1-8B's heads (8 KV heads of 128, 4 query heads each, chunks of 8, rank 160) at the default budget; "
    "the first rows are the ceilings, measured in the same run. Times are of one call in one layer, within a CUDA "
    "graph that goes over as many layers as it takes to read 256 MiB, so that no cache holds them; the reference's are "
    "those of ordinary launches. Bytes are those that must be moved, counted once: over the link where values are on "
    "the host. The share is the time that the ceilings allow (bytes over that of a copy, or of reading host "
    "memory; operations over that of a matrix product) over the time taken. Launches: the time over that of the "
    "smallest kernel of a graph. Dense attention is over as many tokens, gathered beforehand.",
    configs={"cuda": Config()},
    quick=_quick,
    columns=(
        Column(key="operator", heading="operator"),
        Column(key="case", heading="case"),
        Column(key="method", heading="by"),
        Column(key="median", heading="median", unit="s"),
        Column(key="p20", heading="p20", unit="s"),
        Column(key="p80", heading="p80", unit="s"),
        Column(key="bytes", heading="bytes", unit="B"),
        Column(key="bytes_per_s", heading="memory or link", unit="B/s"),
        Column(key="flops_per_s", heading="arithmetic", unit="flop/s"),
        Column(key="share", heading="share of the ceiling", unit="%", digits=0),
        Column(key="launches", heading="launches", unit="x", digits=1),
        Column(key="speedup", heading="× reference", unit="x", digits=0, speedup=True),
    ),
    targets=(
        *(
            Target(
                text=f"{operator}, {case}: share of a copy's bandwidth",
                row={"operator": operator, "case": case, "method": "triton"},
                column="share",
                at_least=0.8,
            )
            for operator, case in (
                ("score_chunks", "122K, batch 8, bf16"),
                ("score_tokens", "122K, batch 8"),
                ("sparse_attention", "122K, batch 8"),
                ("rebuild_keys", "122K, batch 8, bf16"),
            )
        ),
        *(
            Target(
                text=f"fetch_values, {case}, {method}: share of the link",
                row={"operator": "fetch_values", "case": case, "method": method},
                column="share",
                at_least=0.85,
            )
            for case in ("122K, batch 8, bf16 on the host",)
            for method in ("cuda", "triton")
        ),
    ),
    run=run,
)
