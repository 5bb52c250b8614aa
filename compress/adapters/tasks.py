"""`longshadow adapter evaluate --tasks`: benchmarks of lm-eval, run on the models that are loaded."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from longshadow.compress.blocks import compensated
from longshadow.compress.evaluation import Variant

# Prompts at a time; benchmarks have short ones.
BATCH_SIZE = 8
STDERR = "_stderr"


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Benchmarks.

    Attributes:
        names: lm-eval's names of tasks, groups and tags, which may have wildcards, or YAML files of own tasks.
        limit: at most so many examples of each task; None for all.
    """

    names: tuple[str, ...]
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("--tasks takes names of lm-eval's tasks, or YAML files, with commas between them")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--tasks-limit must be at least 1, got {self.limit}")


class Harness:
    """lm-eval with its tasks looked up, which takes no model yet."""

    def __init__(self, tasks: Tasks) -> None:
        """Raises ValueError where lm-eval is not installed, or has no such task."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ValueError("--tasks needs the package lm-eval: pip install 'longshadow[eval]'") from error
        self._limit = tasks.limit
        self._manager = TaskManager()
        self._names: list[str] = []
        for name in tasks.names:
            found = [name] if _is_task_file(name) else self._manager.match_tasks([name])
            if not found:
                raise ValueError(f"lm-eval has no task {name}: `lm-eval ls tasks` lists them; a YAML file will do, too")
            self._names += found

    def run(self, variants: Mapping[str, Variant], tokenizer: Any) -> dict[str, Any]:
        """Scores with their standard errors: `results` by task, metric and variant, as lm-eval has them.

        Raises ValueError in one line where lm-eval cannot run a task, such as for want of its data.
        """
        results: dict[str, dict[str, dict[str, Any]]] = {}
        for variant_name, variant in variants.items():
            with compensated(variant.added), _told_in_a_line(self._names):
                scores = self._run(variant, tokenizer)
            for task, metrics in scores.items():
                for metric, score in metrics.items():
                    results.setdefault(task, {}).setdefault(metric, {})[variant_name] = score
        return {"lm_eval": version("lm-eval"), "limit": self._limit, "results": results}

    def _run(self, variant: Variant, tokenizer: Any) -> dict[str, dict[str, Any]]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        # What is printed on the way is no result.
        with redirect_stdout(sys.stderr):
            found = simple_evaluate(
                model=HFLM(pretrained=variant.model, tokenizer=tokenizer, batch_size=BATCH_SIZE),
                tasks=self._names,
                task_manager=self._manager,
                limit=self._limit,
                log_samples=False,
            )
        return {task: scores_of(values) for task, values in {**found["results"], **found.get("groups", {})}.items()}


def _is_task_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def scores_of(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """From {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}; the filter "none" is left unsaid."""
    found = {}
    for key, value in values.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith(STDERR) or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}{STDERR},{kept}")
        name = metric if kept == "none" else f"{metric} ({kept})"
        found[name] = {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None}
    return found


@contextmanager
def _told_in_a_line(names: list[str]) -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # Tasks are code and data of many authors: what they raise is anything.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"lm-eval cannot run {', '.join(names)} ({reason})") from error
