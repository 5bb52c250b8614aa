"""Runs one table and makes a record of it."""

from __future__ import annotations

import dataclasses
import os
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.environment import describe_environment, device_slug
from bench.record import Record
from bench.render import RESULTS
from bench.revision import current_revision, source_hash
from bench.session import Session, UnitStore, unit_key
from bench.table import Table


def run_table(
    table: Table,
    *,
    device: str = "cpu",
    quick: bool = False,
    fresh: bool = False,
    seed: int = 0,
    commit: str | None = None,
    results: Path = RESULTS,
) -> Record:
    """Measures `table` on `device` and returns the record, which is not written yet.

    Units that an interrupted run of the same configuration and sources has finished are taken over, unless
    `fresh`. Raises ValueError for a device the table has no configuration for.
    """
    kind = device.split(":")[0]
    if kind not in table.configs:
        raise ValueError(f"{table.name} runs on {' and '.join(table.configs)}, not on {device}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; run the CPU table with --device cpu")
    config = table.quick(table.configs[kind]) if quick else table.configs[kind]
    revision = current_revision(commit=commit, environment=os.environ)
    store = UnitStore(
        results / "scratch" / f"{table.name}.partial.jsonl",
        unit_key(dataclasses.asdict(config) | {"seed": seed}, source_hash(), device_slug(device)),
    )
    if fresh:
        store.clear()
    session = Session(device=device, seed=seed, store=store)
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        outcome = table.run(config, session)
    finally:
        session.finish_progress()
    store.clear()
    return Record(
        table=table.name,
        device=device_slug(device),
        config=dataclasses.asdict(config),
        rows=outcome.rows,
        check=outcome.check,
        environment=describe_environment(device),
        revision=revision,
        command=_command(table.name, device=device, quick=quick, seed=seed),
        seed=seed,
        quick=quick,
        created_at=created_at,
    )


def _command(name: str, *, device: str, quick: bool, seed: int) -> str:
    parts = ["python -m bench run", name]
    parts += [f"--device {device}"] if device != "cpu" else []
    parts += ["--quick"] if quick else []
    parts += [f"--seed {seed}"] if seed else []
    return " ".join(parts)
