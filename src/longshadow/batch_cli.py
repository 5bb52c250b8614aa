"""`longshadow generate --input INPUT.jsonl --output OUTPUT.jsonl`. Nothing heavy is imported up here."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from longshadow.batch_files import Results, Task, read_tasks
from longshadow.cli_common import CHECK_FAILED
from longshadow.shadowkv_options import check_model

if TYPE_CHECKING:
    import torch

    from longshadow import ShadowKVConfig


def check_ways(prompt_file: str | None, source: Path | None, target: Path | None, single_only: dict[str, bool]) -> None:
    """Raises ValueError unless either one prompt or a batch is asked for, with what belongs to it."""
    if (prompt_file is None) == (source is None):
        raise ValueError("give either --prompt-file, for one prompt, or --input and --output, for many")
    if (source is None) != (target is None):
        raise ValueError("--input and --output belong together")
    if source is not None:
        for name, is_given in single_only.items():
            if is_given:
                raise ValueError(f"{name} is for one prompt; with --input, say it in the lines of the file")
        if os.path.realpath(source) == os.path.realpath(target or source):
            raise ValueError("--input and --output must be different files")


def run_files(
    source: Path,
    target: Path,
    *,
    model: str,
    adapter: Path | None,
    shadowkv: "ShadowKVConfig",
    sampling: dict[str, Any],
    device: str | None,
    dtype: "torch.dtype | None",
    json_output: bool,
) -> None:
    """Answers the lines of `source` that have no result in `target` yet.

    Raises:
        ValueError: a file cannot be used, or the model cannot be loaded.
    """
    from longshadow.compress.adapters.reading import read_adapter

    # What makes a result another one.
    if adapter is not None:
        read_adapter(adapter)  # raises for what is none, before the model is loaded
    settings = {"model": model, "adapter": str(adapter), "shadowkv": repr(shadowkv), **sampling}
    # Read once to tell mistakes before any work, and again later; what comes through a pipe is gone by then.
    kept: list[Task] | None = None if source.is_file() else list(read_tasks(source, settings))
    num_lines = sum(1 for _ in (read_tasks(source, settings) if kept is None else kept))
    with Results(target) as results:
        from longshadow.batch import run_batch
        from longshadow.engine.runtime import LLM, SamplingParams
        from longshadow.models import load_model

        defaults = SamplingParams(**sampling)
        check_model(model, shadowkv)
        loaded = load_model(model, dtype=dtype, device=device)
        lora = None if adapter is None else str(adapter)
        llm = LLM(loaded.model, tokenizer=loaded.tokenizer, adapter=lora, shadowkv=shadowkv)
        with llm, _LineBar(num_lines) as bar:
            tasks: Iterable[Task] = read_tasks(source, settings) if kept is None else kept
            counts = run_batch(llm, iter(tasks), results, defaults, on_line=bar.advance)
    if json_output:
        print(json.dumps({"answered": counts.answered, "refused": counts.refused, "done_before": counts.done_before}))
    else:
        before = f", {counts.done_before} were there already" if counts.done_before else ""
        print(f"{counts.answered} answered, {counts.refused} refused{before}: {target}", file=sys.stderr)
    if counts.refused:
        raise typer.Exit(CHECK_FAILED)


class _LineBar:
    """A progress bar over lines, on stderr, gone when the work is done."""

    def __init__(self, num_lines: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("line {task.completed}/{task.total}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("lines", total=num_lines)

    def __enter__(self) -> "_LineBar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self) -> None:
        self._progress.advance(self._task)
