"""TRL's trainers with shared prefixes switched on: the same arguments, losses, metrics and weights."""

from typing import Any

from longshadow.engine.prefix_sharing.backbone import SharingReport, enable_prefix_sharing

try:
    from trl.trainer.dpo_trainer import DPOTrainer
except ImportError as error:
    raise ImportError("the trainers need TRL and PEFT: pip install 'longshadow[train]'") from error


class PrefixSharingDPOTrainer(DPOTrainer):
    """`trl.DPOTrainer` whose policy and reference compute a pair's common prefix once.

    Args:
        minimum_ratio, verify_first_batch: as in `share_prefixes`.
        *args, **kwargs: as in `trl.DPOTrainer`.

    Attributes:
        policy_sharing, reference_sharing: what was shared; the reference's is None where the policy without its
            adapter, or precomputed log-probabilities, take its place.

    The models stay as they are afterwards; `disable_prefix_sharing(trainer.model)` takes the sharing away.
    """

    def __init__(self, *args: Any, minimum_ratio: float = 1.1, verify_first_batch: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options: dict[str, Any] = dict(minimum_ratio=minimum_ratio, verify_first_batch=verify_first_batch)
        policy = self.accelerator.unwrap_model(self.model)
        self.policy_sharing: SharingReport = enable_prefix_sharing(policy, **options)
        self.reference_sharing: SharingReport | None = None
        if self.ref_model is not None:
            self.reference_sharing = enable_prefix_sharing(self.accelerator.unwrap_model(self.ref_model), **options)
