"""Second moments of what a layer is given, or of the error it makes with it: plain means over real tokens.

`shrunk` moves them toward those of uncorrelated channels, C <- (1 - s) C + s diag(C). Correlations are the part that a
few thousand tokens of one text tell least about, and the part that compensation itself changes, since it changes what
later layers are given.

Legend: N tokens, n inputs of a layer, m outputs; R [m, n] the residual, what quantisation took from the weight.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch


class Moments(Protocol):
    """What the solver knows of the activations."""

    num_tokens: int

    @property
    def energies(self) -> torch.Tensor:
        """diag(C), the mean square of each input, [n]. Raises ValueError before the first token."""
        ...

    def add(self, inputs: torch.Tensor) -> None:
        """Takes in real tokens [..., n]; padding has to be left out."""
        ...

    def error_gram(self, residual: torch.Tensor) -> torch.Tensor:
        """G = R C R^T, [m, m]: the second moment of the error that the residual [m, n] makes, in fp64."""
        ...

    def error_operator(self, residual: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """What multiplies a block [m, b] with G, in fp64, without making G where that is dear."""
        ...

    def random_errors(self, residual: torch.Tensor, count: int) -> torch.Tensor:
        """Random combinations of errors, [m, count] in fp64, the same at every call: a block in the range of G."""
        ...

    def shrunk(self, share: float) -> "Moments":
        """Those of C moved by the share, 0 to 1, toward its diagonal."""
        ...

    def of_weighted_errors(self, roots: torch.Tensor) -> "Moments":
        """Those for the residual whose rows are multiplied by the roots [m]."""
        ...


class InputMoments:
    """C = mean x x^T over tokens, [n, n], shared by the layers that are given the same inputs.

    Products are in fp32, sums in fp64, so neither the order of samples nor a massive activation among them matters.
    """

    def __init__(self, width: int, *, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.num_tokens = 0

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Self:
        """As of one token with the second moment `matrix` [n, n]."""
        moments = cls(len(matrix), device=matrix.device)
        moments._sum += matrix
        moments.num_tokens = 1
        return moments

    def add(self, inputs: torch.Tensor) -> None:
        """Takes in real tokens [..., n]; padding has to be left out."""
        tokens = inputs.detach().flatten(0, -2).float()
        self._sum += (tokens.T @ tokens).double()
        self.num_tokens += len(tokens)

    @property
    def matrix(self) -> torch.Tensor:
        """C. Raises ValueError before the first token."""
        return _mean(self._sum, self.num_tokens)

    @property
    def energies(self) -> torch.Tensor:
        """As `Moments`."""
        return self.matrix.diagonal()

    def error_gram(self, residual: torch.Tensor) -> torch.Tensor:
        """As `Moments`."""
        residual = residual.double()
        return residual @ self.matrix @ residual.T

    def error_operator(self, residual: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """As `Moments`."""
        residual, matrix = residual.double(), self.matrix
        # Wide by tall products, the block's rows first, are faster on a CPU than tall by thin ones.
        return lambda block: (((block.T @ residual) @ matrix) @ residual.T).T

    def random_errors(self, residual: torch.Tensor, count: int) -> torch.Tensor:
        """As `Moments`: R C times a random block, which costs half a product with G."""
        matrix = self.matrix
        return residual.double() @ (matrix @ _random_block(len(matrix), count, matrix.device))

    def shrunk(self, share: float) -> "InputMoments":
        """As `Moments`."""
        matrix = self.matrix
        return InputMoments.of((1 - share) * matrix + share * torch.diag(self.energies))

    def of_weighted_errors(self, roots: torch.Tensor) -> "InputMoments":
        """As `Moments`: these, since they know nothing of the residual."""
        return self


class ErrorMoments:
    """G = mean (R x)(R x)^T over tokens, [m, m], of one residual: the smaller matrix where m is less than n."""

    def __init__(self, residual: torch.Tensor) -> None:
        self._residual = residual.float()
        num_outputs, num_inputs = residual.shape
        self._sum = torch.zeros(num_outputs, num_outputs, dtype=torch.float64, device=residual.device)
        self._squares = torch.zeros(num_inputs, dtype=torch.float64, device=residual.device)
        self.num_tokens = 0

    @property
    def energies(self) -> torch.Tensor:
        """As `Moments`."""
        return _mean(self._squares, self.num_tokens)

    def add(self, inputs: torch.Tensor) -> None:
        """Takes in real tokens [..., n]; padding has to be left out."""
        tokens = inputs.detach().flatten(0, -2).float()
        errors = tokens @ self._residual.T
        self._sum += (errors.T @ errors).double()
        self._squares += tokens.square().sum(0).double()
        self.num_tokens += len(errors)

    def error_gram(self, residual: torch.Tensor) -> torch.Tensor:
        """As `Moments`, for the residual it was made for."""
        assert torch.allclose(residual.float(), self._residual, rtol=1e-5, atol=0)
        return _mean(self._sum, self.num_tokens)

    def error_operator(self, residual: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """As `Moments`, for the residual it was made for."""
        gram = self.error_gram(residual)
        return lambda block: gram @ block

    def random_errors(self, residual: torch.Tensor, count: int) -> torch.Tensor:
        """As `Moments`, for the residual it was made for."""
        return self.error_gram(residual) @ _random_block(len(residual), count, residual.device)

    def shrunk(self, share: float) -> "ErrorMoments":
        """As `Moments`."""
        uncorrelated = ((self._residual * self.energies.float()) @ self._residual.T).double()
        return self._with(self._residual, (1 - share) * _mean(self._sum, self.num_tokens) + share * uncorrelated)

    def of_weighted_errors(self, roots: torch.Tensor) -> "ErrorMoments":
        """As `Moments`."""
        roots = roots.double()
        gram = roots.unsqueeze(1) * _mean(self._sum, self.num_tokens) * roots
        return self._with((roots.unsqueeze(1) * self._residual.double()).float(), gram)

    def _with(self, residual: torch.Tensor, gram: torch.Tensor) -> "ErrorMoments":
        """For another residual, as of one token."""
        moments = ErrorMoments(residual)
        moments._sum, moments._squares, moments.num_tokens = gram, self.energies, 1
        return moments


class RefitMoments:
    """What says which B is best for a given A [r, n]: mean (R x)(A x)^T, [m, r], and mean (A x)(A x)^T, [r, r]."""

    def __init__(self, residual: torch.Tensor, lora_a: torch.Tensor) -> None:
        self._residual, self._lora_a = residual.float(), lora_a.float()
        rank = len(lora_a)
        self._cross = torch.zeros(len(residual), rank, dtype=torch.float64, device=residual.device)
        self._inner = torch.zeros(rank, rank, dtype=torch.float64, device=residual.device)
        self.num_tokens = 0

    @classmethod
    def of(cls, residual: torch.Tensor, lora_a: torch.Tensor, covariance: torch.Tensor) -> Self:
        """From C [n, n], where it is known: R C A^T and A C A^T."""
        moments = cls(residual, lora_a)
        seen = covariance @ lora_a.double().T
        moments._cross += residual.double() @ seen
        moments._inner += lora_a.double() @ seen
        moments.num_tokens = 1
        return moments

    def add(self, inputs: torch.Tensor) -> None:
        """Takes in real tokens [..., n]; padding has to be left out."""
        tokens = inputs.detach().flatten(0, -2).float()
        reduced = tokens @ self._lora_a.T
        self._cross += ((tokens @ self._residual.T).T @ reduced).double()
        self._inner += (reduced.T @ reduced).double()
        self.num_tokens += len(tokens)

    def shrunk(self, share: float, energies: torch.Tensor) -> "RefitMoments":
        """Those of C moved by the share toward its diagonal, which is `energies` [n]."""
        moments = RefitMoments(self._residual, self._lora_a)
        seen = energies.unsqueeze(1) * self._lora_a.double().T
        moments._cross = (1 - share) * self.cross + share * (self._residual.double() @ seen)
        moments._inner = (1 - share) * self.inner + share * (self._lora_a.double() @ seen)
        moments.num_tokens = 1
        return moments

    @property
    def cross(self) -> torch.Tensor:
        """Mean (R x)(A x)^T. Raises ValueError before the first token."""
        return _mean(self._cross, self.num_tokens)

    @property
    def inner(self) -> torch.Tensor:
        """Mean (A x)(A x)^T. Raises ValueError before the first token."""
        return _mean(self._inner, self.num_tokens)


def input_moments_are_cheaper(width: int, heights: Sequence[int]) -> bool:
    """Whether C costs fewer operations a token than every layer's own G: n^2 against the sum of m n + m^2."""
    return width * width <= sum(height * (width + height) for height in heights)


def _random_block(size: int, count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, count, generator=generator, dtype=torch.float64).to(device)


def _mean(total: torch.Tensor, count: int) -> torch.Tensor:
    if count == 0:
        raise ValueError("no tokens have been counted: the calibration text is empty")
    return total / count
