"""Batches of pairs, cut by what they cost, in a trainer."""

from contextlib import nullcontext
from typing import Any

import torch

from longshadow.engine.prefix_sharing.packing import fewest_packs, pack, pair_costs, take_pairs
from longshadow.engine.prefix_sharing.sharing_trainer import SharingTrainer

# DPO's losses that are a mean over pairs. Others sort pairs, or count tokens, over a micro-batch.
MEANS_OVER_PAIRS = {
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
}


class PackedMicroBatches(SharingTrainer):
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
        if getattr(trainer, "_is_vision_dataset", False):
            raise ValueError("packing_tokens does not cut batches with images: leave it out")
        if getattr(trainer, "aux_loss_enabled", False):
            raise ValueError(
                "packing_tokens would change the experts' load balance, which is counted over a micro-batch: leave it "
                "out, or set the model's router_aux_loss_coef to 0"
            )

    def _refuse(self, given: dict[str, Any]) -> None:
        super()._refuse(given)
        args = given.get("args")
        if self.packing_tokens is None or args is None:
            return
        losses = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
        mixing = sorted(set(losses) - MEANS_OVER_PAIRS)
        if mixing:
            raise ValueError(
                f"packing_tokens would change the loss {', '.join(mixing)}, which depends on the pairs of a "
                "micro-batch: leave it out"
            )
        if args.neftune_noise_alpha is not None:
            raise ValueError(
                "packing_tokens counts shared prefixes once, and NEFTune's noise keeps them from being shared: leave "
                "out packing_tokens or neftune_noise_alpha"
            )

    def compute_ref_log_probs(self, *args: Any) -> Any:
        """Chosen and rejected log-probabilities of a batch, [pairs] each; newer versions of TRL pass a model first."""
        *model, inputs = args
        compute = super().compute_ref_log_probs  # type: ignore[misc]
        # TRL precomputes them while it is being made, too.
        with self.sharing():
            if self.packing_tokens is None:
                return compute(*model, inputs)
            packs = self._packs(pair_costs(inputs), self.packing_tokens)
            parts = [compute(*model, take_pairs(inputs, pairs)) for pairs in packs]
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
