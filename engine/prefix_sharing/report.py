"""Counts what sharing did."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class SharingReport:
    """Counts since sharing was enabled.

    Attributes:
        shared_batches, ordinary_batches: forwards that went each way. Those of generation, which fill or continue a
            cache, are neither.
        padded_tokens, real_tokens, unique_tokens: of the shared batches; real ones are no padding, and padded over
            unique is how much less the backbone had to compute.
        reasons: why forwards went the ordinary way, and how often.
        verified_kinds: kinds of batches of which the first was compared with the ordinary path, and agreed.
    """

    shared_batches: int = 0
    ordinary_batches: int = 0
    padded_tokens: int = 0
    real_tokens: int = 0
    unique_tokens: int = 0
    reasons: dict[str, int]
    verified_kinds: int = 0

    @property
    def num_batches(self) -> int:
        """Forwards that could have been shared."""
        return self.shared_batches + self.ordinary_batches

    @property
    def verified(self) -> bool:
        """A shared batch was compared with the ordinary path, and agreed."""
        return self.verified_kinds > 0

    @property
    def token_ratio(self) -> float:
        """Padded tokens per distinct one; 1 where nothing was shared."""
        return self.padded_tokens / self.unique_tokens if self.unique_tokens else 1.0

    @property
    def summary(self) -> str:
        """All of it in one line."""
        line = (
            f"prefix sharing: {self.shared_batches} of {self.num_batches} batches shared, "
            f"{self.token_ratio:.2f} padded tokens per computed one"
        )
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.reasons.items())
        return f"{line}; the ordinary way: {reasons}" if reasons else line
