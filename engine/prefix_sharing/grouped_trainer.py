"""Completions of a prompt kept together, in a trainer."""

import logging
from typing import Any

from longshadow.engine.prefix_sharing.grouping import per_step, regroup, why_micro_batches_stay
from longshadow.engine.prefix_sharing.sharing_trainer import SharingTrainer

logger = logging.getLogger(__name__)


class GroupedMicroBatches(SharingTrainer):
    """Keeps the completions of a prompt together where TRL shuffles them over the micro-batches of a step.

    Where a step is more than a sum over its rows, TRL's micro-batches stay, and only rows that meet in one share.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        reason = why_micro_batches_stay(self)
        self._regroups = reason is None
        trainer: Any = self
        if reason is not None and trainer.args.steps_per_generation > 1:
            logger.warning("prefix sharing keeps TRL's shuffled micro-batches, so less is shared: %s", reason)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        trainer: Any = self
        before = trainer._buffered_inputs
        parent: Any = super()
        inputs = parent._prepare_inputs(generation_batch)
        batches = trainer._buffered_inputs
        if not self._regroups or not trainer.model.training or batches is before:
            return inputs
        count = per_step(trainer.args)
        trainer._buffered_inputs = [
            batch for start in range(0, len(batches), count) for batch in regroup(batches[start : start + count])
        ]
        return trainer._buffered_inputs[trainer._step % trainer.args.steps_per_generation]
