"""The part that all trainers have in common: sharing is on while they work, and off again whatever happens."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import nn

from longshadow.engine.prefix_sharing.backbone import check_sharing, language_model_of, share_prefixes
from longshadow.engine.prefix_sharing.callback import PrefixSharingCallback
from longshadow.engine.prefix_sharing.head import project_labelled_cells
from longshadow.engine.prefix_sharing.options import SharingOptions
from longshadow.engine.prefix_sharing.report import SharingReport
from longshadow.models import empty_model


class SharingTrainer:
    """Shares prefixes in the trainer it is mixed into, which projects only labelled positions.

    Args:
        minimum_ratio, verify_first_batch, on_mismatch, attention: as in `share_prefixes`.
        log_sharing: add `prefix_sharing/token_ratio` and `prefix_sharing/shared_batches` to what is logged, as
            `PrefixSharingCallback` does.
        *args, **kwargs: as in TRL's trainer.

    Attributes:
        policy_sharing, reference_sharing: what was shared; the reference's is None where there is no such model
            (the policy without its adapter, or precomputed log-probabilities, take its place).

    Models share within `train`, `evaluate`, `predict` and `sharing()`, and are their own again afterwards, also after
    an error. Those that cannot share are refused before anything else is done.
    """

    def __init__(
        self,
        *args: Any,
        minimum_ratio: float = 1.1,
        verify_first_batch: bool = True,
        on_mismatch: Literal["raise", "ordinary"] = "raise",
        attention: str = "auto",
        log_sharing: bool = False,
        **kwargs: Any,
    ) -> None:
        self._options = SharingOptions(
            minimum_ratio=minimum_ratio,
            verify_first_batch=verify_first_batch,
            on_mismatch=on_mismatch,
            attention=attention,
        )
        self._sharing_depth = 0
        self.policy_sharing = SharingReport(reasons={})
        self.reference_sharing: SharingReport | None = None
        parent: Any = super()
        try:
            given = inspect.signature(parent.__init__).bind_partial(*args, **kwargs).arguments
        except TypeError:  # the parent says it better
            given = {}
        self._refuse(given)
        parent.__init__(*args, **kwargs)
        trainer: Any = self
        for model in self._models():
            check_sharing(model)
        if getattr(trainer, "ref_model", None) is not None and self.reference_sharing is None:
            self.reference_sharing = SharingReport(reasons={})
        # First of all, so that whatever else is told of a step's log finds it complete.
        callback = PrefixSharingCallback(lambda: self.policy_sharing, log=log_sharing)
        trainer.callback_handler.callbacks.insert(0, callback)

    def _refuse(self, given: dict[str, Any]) -> None:
        """Raises ValueError for arguments of TRL's trainer that are known not to work, before it begins."""
        for name in ("model", "ref_model"):
            model = given.get(name)
            if isinstance(model, str):
                try:
                    model = empty_model(model)
                except ValueError:  # the parent says it better, or finds it with options of its own
                    continue
            if isinstance(model, nn.Module):
                check_sharing(model)
        if getattr(given.get("peft_config"), "is_prompt_learning", False):
            raise ValueError("prompt-learning adapters put their own tokens before each row: prefixes cannot be shared")

    def _models(self) -> list[Any]:
        """The policy, and the reference where it is a model of its own."""
        trainer: Any = self
        models = (trainer.model, getattr(trainer, "ref_model", None))
        return [trainer.accelerator.unwrap_model(model) for model in models if model is not None]

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Within, the trainer's models share prefixes, for steps that are taken by hand."""
        with ExitStack() as stack:
            if not self._sharing_depth:
                policy, *others = self._models()
                self.policy_sharing = self._share(stack, policy, self.policy_sharing)
                for reference in others:
                    self.reference_sharing = self._share(stack, reference, self.reference_sharing)
            self._sharing_depth += 1
            try:
                yield
            finally:
                self._sharing_depth -= 1

    def _share(self, stack: ExitStack, model: Any, report: SharingReport | None) -> SharingReport:
        report = stack.enter_context(share_prefixes(model, report=report, **vars(self._options)))
        stack.enter_context(project_labelled_cells(language_model_of(model)))
        return report

    def train(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        with self.sharing():
            return parent.train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        with self.sharing():
            return parent.evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        with self.sharing():
            return parent.predict(*args, **kwargs)
