"""Tells in a trainer's logs, and in one line at its end, how much sharing saves."""

import sys
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from longshadow.engine.prefix_sharing.report import SharingReport


class PrefixSharingCallback(TrainerCallback):
    """Adds `prefix_sharing/token_ratio` and `prefix_sharing/shared_batches` (a share) to logs; prints a last line.

    Args:
        report: of `share_prefixes`, or a function that gives it.
        log: False only prints.

    Callbacks that stand before it, as those of `report_to`, have seen a step's log when it is completed. To be first:
    `trainer.callback_handler.callbacks.insert(0, PrefixSharingCallback(report))`.
    """

    def __init__(self, report: SharingReport | Callable[[], SharingReport], *, log: bool = True) -> None:
        self._report = report
        self._log = log

    @property
    def report(self) -> SharingReport:
        return self._report if isinstance(self._report, SharingReport) else self._report()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        report = self.report
        if not self._log or logs is None or "loss" not in logs or not report.num_batches:
            return
        added = {
            "prefix_sharing/token_ratio": report.token_ratio,
            "prefix_sharing/shared_batches": report.shared_batches / report.num_batches,
        }
        logs.update(added)
        # The history has a copy of its own.
        state.log_history[-1].update(added)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            # Not among the results of the program that trains.
            print(self.report.summary, file=sys.stderr)
