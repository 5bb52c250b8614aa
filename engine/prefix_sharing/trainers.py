"""TRL's trainers with shared prefixes switched on: the same arguments, losses, metrics and weights."""

import logging
from contextlib import nullcontext
from typing import Any

import torch

from longshadow.engine.prefix_sharing.aggregation import delta_l_weights
from longshadow.engine.prefix_sharing.backbone import SharingReport, enable_prefix_sharing, language_model_of
from longshadow.engine.prefix_sharing.grouping import regroup
from longshadow.engine.prefix_sharing.head import project_labelled_cells
from longshadow.engine.prefix_sharing.packing import fewest_packs, pack, pair_costs, take_pairs

try:
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer
except ImportError as error:
    raise ImportError("the trainers need TRL and PEFT: pip install 'longshadow[train]'") from error

logger = logging.getLogger(__name__)

# Losses whose value depends on which pairs share a micro-batch: two sort over it, one counts its tokens.
LOSSES_OF_A_BATCH = {"aot", "aot_unpaired", "sft"}


class _SharingTrainer:
    """Switches sharing on for the models of the trainer it is mixed into, and projects only labelled positions.

    Args:
        minimum_ratio, verify_first_batch, attention: as in `share_prefixes`.
        *args, **kwargs: as in TRL's trainer.

    Attributes:
        policy_sharing, reference_sharing: what was shared; the reference's is None where there is no such model
            (the policy without its adapter, or precomputed log-probabilities, take its place).

    The models stay as they are afterwards; `disable_prefix_sharing(trainer.model)` takes the sharing away.
    """

    def __init__(
        self,
        *args: Any,
        minimum_ratio: float = 1.1,
        verify_first_batch: bool = True,
        attention: str = "auto",
        **kwargs: Any,
    ) -> None:
        self._options: dict[str, Any] = dict(
            minimum_ratio=minimum_ratio, verify_first_batch=verify_first_batch, attention=attention
        )
        self.policy_sharing: SharingReport | None = None
        self.reference_sharing: SharingReport | None = None
        super().__init__(*args, **kwargs)
        self._share_models()

    def _share_models(self) -> None:
        """Both models, as far as they are there and not sharing yet."""
        trainer: Any = self
        if self.policy_sharing is None:
            self.policy_sharing = self._share(trainer.model)
        if self.reference_sharing is None and getattr(trainer, "ref_model", None) is not None:
            self.reference_sharing = self._share(trainer.ref_model)

    def _share(self, model: Any) -> SharingReport:
        trainer: Any = self
        unwrapped = trainer.accelerator.unwrap_model(model)
        report = enable_prefix_sharing(unwrapped, **self._options)
        project_labelled_cells(language_model_of(unwrapped))
        return report


class _PackedMicroBatches(_SharingTrainer):
    """Cuts a batch into micro-batches of whole pairs within a budget of distinct tokens.

    Args:
        packing_tokens: the budget; None trains each batch at once. Let per_device_train_batch_size be the pairs of a
            step, and this bound the memory, also where reference log-probabilities are precomputed; evaluation is not
            cut. All pairs of an accumulation window and all processes weigh alike, however they are cut.
    """

    def __init__(self, *args: Any, packing_tokens: int | None = None, **kwargs: Any) -> None:
        if packing_tokens is not None and packing_tokens < 1:
            raise ValueError(f"packing_tokens must be at least 1, got {packing_tokens}")
        self.packing_tokens = packing_tokens
        self._pairs_in_window = 0
        self._pair_weight = 1.0
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if packing_tokens is None:
            return
        mixing = sorted(LOSSES_OF_A_BATCH.intersection(trainer.loss_types))
        if mixing:
            raise ValueError(
                f"packing_tokens would change the loss {', '.join(mixing)}, which depends on the pairs of a "
                "micro-batch: leave it out"
            )
        if getattr(trainer, "_is_vision_dataset", False):
            raise ValueError("packing_tokens does not cut batches with images: leave it out")
        if trainer.args.neftune_noise_alpha is not None:
            raise ValueError(
                "packing_tokens counts shared prefixes once, and NEFTune's noise keeps them from being shared: leave "
                "out packing_tokens or neftune_noise_alpha"
            )
        if getattr(trainer, "aux_loss_enabled", False):
            logger.warning("packing: the experts' load balance is counted over each micro-batch, not the whole batch")

    def compute_ref_log_probs(self, *args: Any) -> Any:
        """Chosen and rejected log-probabilities of a batch, [pairs] each; newer versions of TRL pass a model first."""
        *model, inputs = args
        # TRL precomputes them while it is being made.
        self._share_models()
        parent: Any = super()
        if self.packing_tokens is None:
            return parent.compute_ref_log_probs(*model, inputs)
        packs = self._packs(pair_costs(inputs), self.packing_tokens)
        parts = [parent.compute_ref_log_probs(*model, take_pairs(inputs, pairs)) for pairs in packs]
        # The packs' pairs, back in the batch's order.
        order = torch.tensor([pair for pairs in packs for pair in pairs]).argsort()
        return tuple(torch.cat(logps)[order.to(logps[0].device)] for logps in zip(*parts, strict=True))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        samples, items = parent.get_batch_samples(*args, **kwargs)
        if self.packing_tokens is not None and samples:
            accelerator = self._accelerator
            pairs = sum(len(batch["input_ids"]) // 2 for batch in samples)
            self._pairs_in_window = int(accelerator.reduce(torch.tensor(pairs, device=accelerator.device)))
        return samples, items

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        trainer: Any = self
        parent: Any = super()
        if self.packing_tokens is None:
            loss: torch.Tensor = parent.training_step(model, inputs, *args, **kwargs)
            return loss
        accelerator = self._accelerator
        costs = pair_costs(inputs)
        packs = self._packs(costs, self.packing_tokens)
        # A micro-batch is the mean over its pairs, which the trainer divides by the window's batches and averages
        # over processes: this turns it into its part of the mean over all pairs of the window.
        parts = trainer.current_gradient_accumulation_steps * accelerator.num_processes
        scale = parts / (self._pairs_in_window or parts * len(costs))
        metrics = trainer._metrics["train"]
        before = {key: len(values) for key, values in metrics.items()}
        losses = []
        for number, pairs in enumerate(packs, 1):
            self._pair_weight = len(pairs) * scale
            # Gradients of several processes are added up once, after the last.
            with nullcontext() if number == len(packs) else accelerator.no_sync(model):
                losses.append(parent.training_step(model, take_pairs(inputs, pairs), *args, **kwargs))
        _average(metrics, before, [len(pairs) / len(costs) for pairs in packs])
        return torch.stack(losses).sum()

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        loss = parent.compute_loss(model, *args, **kwargs)
        return loss * self._pair_weight if self.packing_tokens is not None and model.training else loss

    def _packs(self, costs: list[int], budget: int) -> list[list[int]]:
        """As many on every process, as sharded models need the same passes of all."""
        needed = torch.tensor([fewest_packs(costs, budget)], device=self._accelerator.device)
        return pack(costs, int(self._accelerator.gather(needed).max()))

    @property
    def _accelerator(self) -> Any:
        trainer: Any = self
        return trainer.accelerator


def _average(metrics: dict[str, list[float]], before: dict[str, int], weights: list[float]) -> None:
    """One entry per metric for all micro-batches of a batch, as if it had been one."""
    for key, values in metrics.items():
        added = values[before.get(key, 0) :]
        if len(added) == len(weights):
            values[before.get(key, 0) :] = [sum(w * value for w, value in zip(weights, added, strict=True))]


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


class PrefixSharingDPOTrainer(_PackedMicroBatches, DPOTrainer):
    """`trl.DPOTrainer` whose policy and reference compute a pair's common prefix once."""


class PrefixSharingGRPOTrainer(_GroupedBatches, GRPOTrainer):
    """`trl.GRPOTrainer` whose passes over completions compute a group's prompt once; generation is TRL's own.

    Args:
        delta_l: alpha of delta-L normalisation (`delta_l_weights`), from 0 to 1, over each generation batch; needs
            loss_type="dr_grpo", whose divisor is constant. A KL penalty keeps its own weights. None: TRL's own.

    Reward-decoupled normalisation (GDPO, arXiv 2601.05242) is TRL's multi_objective_aggregation="normalize_then_sum".
    """

    def __init__(self, *args: Any, delta_l: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.delta_l = delta_l
        if delta_l is None:
            return
        delta_l_weights(torch.ones(1), delta_l)
        if self.loss_type != "dr_grpo":
            raise ValueError(f"delta_l needs loss_type='dr_grpo', got {self.loss_type!r}")

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


class PrefixSharingRLOOTrainer(_GroupedBatches, RLOOTrainer):
    """`trl.RLOOTrainer` whose passes over completions compute a group's prompt once; generation is TRL's own."""
