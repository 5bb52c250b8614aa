"""TRL's trainers with shared prefixes switched on: the same arguments, losses, metrics and weights."""

from typing import Any

import torch

from longshadow.engine.prefix_sharing.backbone import SharingReport, enable_prefix_sharing
from longshadow.engine.prefix_sharing.grouping import regroup

try:
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer
except ImportError as error:
    raise ImportError("the trainers need TRL and PEFT: pip install 'longshadow[train]'") from error


class _SharingTrainer:
    """Switches sharing on for the models of the trainer it is mixed into.

    Args:
        minimum_ratio, verify_first_batch: as in `share_prefixes`.
        *args, **kwargs: as in TRL's trainer.

    Attributes:
        policy_sharing, reference_sharing: what was shared; the reference's is None where there is no such model
            (the policy without its adapter, or precomputed log-probabilities, take its place).

    The models stay as they are afterwards; `disable_prefix_sharing(trainer.model)` takes the sharing away.
    """

    def __init__(self, *args: Any, minimum_ratio: float = 1.1, verify_first_batch: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        options: dict[str, Any] = dict(minimum_ratio=minimum_ratio, verify_first_batch=verify_first_batch)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        self.policy_sharing: SharingReport = enable_prefix_sharing(policy, **options)
        self.reference_sharing: SharingReport | None = None
        if trainer.ref_model is not None:
            reference = trainer.accelerator.unwrap_model(trainer.ref_model)
            self.reference_sharing = enable_prefix_sharing(reference, **options)


class _GroupedBatches(_SharingTrainer):
    """Keeps the completions of a prompt together where TRL shuffles them over micro-batches."""

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        trainer: Any = self
        before = trainer._buffered_inputs
        parent: Any = super()
        inputs = parent._prepare_inputs(generation_batch)
        if not trainer.model.training or trainer._buffered_inputs is before:
            return inputs
        # A generator of its own: the global one decides what is sampled next.
        generator = torch.Generator().manual_seed(trainer.args.seed + trainer._step)
        trainer._buffered_inputs = regroup(trainer._buffered_inputs, generator)
        return trainer._buffered_inputs[trainer._step % trainer.args.steps_per_generation]


class PrefixSharingDPOTrainer(_SharingTrainer, DPOTrainer):
    """`trl.DPOTrainer` whose policy and reference compute a pair's common prefix once."""


class PrefixSharingGRPOTrainer(_GroupedBatches, GRPOTrainer):
    """`trl.GRPOTrainer` whose passes over completions compute a group's prompt once; generation is TRL's own."""


class PrefixSharingRLOOTrainer(_GroupedBatches, RLOOTrainer):
    """`trl.RLOOTrainer` whose passes over completions compute a group's prompt once; generation is TRL's own."""
