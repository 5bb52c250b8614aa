"""TRL's trainers with shared prefixes switched on: the same arguments, and TRL's numbers (README says which)."""

from typing import Any

import torch

from longshadow.engine.prefix_sharing.aggregation import delta_l_weights
from longshadow.engine.prefix_sharing.grouped_trainer import GroupedMicroBatches
from longshadow.engine.prefix_sharing.packed_trainer import PackedMicroBatches

try:
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer
except ImportError as error:
    raise ImportError("the trainers need TRL and PEFT: pip install 'longshadow[train]'") from error


class PrefixSharingDPOTrainer(PackedMicroBatches, DPOTrainer):
    """`trl.DPOTrainer` whose policy and reference compute a pair's common prefix once."""


class PrefixSharingGRPOTrainer(GroupedMicroBatches, GRPOTrainer):
    """`trl.GRPOTrainer` whose passes over completions compute a group's prompt once; generation is TRL's own.

    Args:
        delta_l: alpha of delta-L normalisation (`delta_l_weights`), from 0 to 1, over each generation batch; needs
            loss_type="dr_grpo", whose divisor is constant. A KL penalty keeps its own weights. None: TRL's own.

    Reward-decoupled normalisation (GDPO, arXiv 2601.05242) is TRL's multi_objective_aggregation="normalize_then_sum".
    """

    def __init__(self, *args: Any, delta_l: float | None = None, **kwargs: Any) -> None:
        if delta_l is not None:
            delta_l_weights(torch.ones(1), delta_l)
        self.delta_l = delta_l
        super().__init__(*args, **kwargs)

    def _refuse(self, given: dict[str, Any]) -> None:
        super()._refuse(given)
        loss = getattr(given.get("args") or GRPOConfig, "loss_type", None)
        if self.delta_l is not None and loss != "dr_grpo":
            raise ValueError(f"delta_l needs loss_type='dr_grpo', got {loss!r}")

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        trainer: Any = self
        if self.delta_l is not None and trainer.model.training:
            trained = output["completion_mask"] * output.get("tool_mask", 1)
            lengths = trained.sum(1)
            weights = delta_l_weights(self.accelerator.gather(lengths), self.delta_l)
            first = self.accelerator.process_index * len(lengths)
            output["advantages"] = output["advantages"] * weights[first : first + len(lengths)]
        return output


class PrefixSharingRLOOTrainer(GroupedMicroBatches, RLOOTrainer):
    """`trl.RLOOTrainer` whose passes over completions compute a group's prompt once; generation is TRL's own."""
