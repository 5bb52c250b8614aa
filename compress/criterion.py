"""What the low-rank factors of a layer are to make small: ||D^(1/2) (R - B A) C_s^(1/2)||_F^2.

EoRA as published takes C = E[x x^T] and D = 1. Here C_s = (1 - s) C + s diag(C), and "fisher" takes D = diag(d), how
much the model's loss minds an error in each output.

Legend: n inputs of a layer, m outputs; R [m, n] the residual.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from longshadow.compress.statistics import InputMoments, Moments

Method = Literal["eora", "diagonal", "svd", "fisher"]
METHODS: tuple[Method, ...] = ("eora", "diagonal", "svd", "fisher")


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """How errors are weighed.

    Attributes:
        method: "eora"; "fisher", which weighs outputs, too; "diagonal", as LQER, with C's diagonal alone, whatever the
            shrinkage; "svd", of the residual itself.
        shrinkage: s, the share by which C is moved toward its diagonal, from 0, as published, to 1.
    """

    method: Method = "eora"
    shrinkage: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage must be from 0 to 1, got {self.shrinkage}")

    @property
    def share(self) -> float:
        """What the method moves C by."""
        return 1.0 if self.method == "diagonal" else self.shrinkage

    def objective(
        self, residual: torch.Tensor, moments: Moments, output_weights: torch.Tensor | None = None
    ) -> "Objective":
        """For one layer: `residual` [m, n], the moments of its inputs or errors, and d [m], which "fisher" needs.

        Raises ValueError where it lacks weights of at least 0 for its outputs.
        """
        if self.method == "svd":
            eye = torch.eye(residual.shape[1], dtype=torch.float64, device=residual.device)
            return Objective(target=residual.double(), moments=InputMoments.of(eye))
        used = moments.shrunk(self.share) if self.share > 0 else moments
        if self.method != "fisher":
            return Objective(target=residual.double(), moments=used)
        if output_weights is None or output_weights.shape != residual.shape[:1] or bool((output_weights < 0).any()):
            raise ValueError(f"the method fisher needs {len(residual)} output weights of at least 0")
        # A loss that minds no output has nothing to say about them.
        weights = output_weights.double() if bool(output_weights.any()) else torch.ones_like(output_weights).double()
        roots = weights.sqrt()
        return Objective(
            target=roots.unsqueeze(1) * residual.double(), moments=used.of_weighted_errors(roots), output_roots=roots
        )


AS_PUBLISHED = Criterion()


@dataclass(frozen=True, eq=False, kw_only=True)
class Objective:
    """A criterion applied to one layer.

    Attributes:
        target: D^(1/2) R, [m, n] in fp64.
        moments: of C_s, or of the target's errors under it.
        output_roots: the diagonal of D^(1/2), [m], if not 1.
    """

    target: torch.Tensor
    moments: Moments
    output_roots: torch.Tensor | None = None
