"""`summarize_keys`: once per prompt, sequence and layer; memory and tensor cores bound it about alike.

Keys are read and written once, 488 MiB together at 122K tokens; their Gram matrix takes 131 GFLOP on and above the
diagonal. What tiles read again comes from the L2 cache and is not counted.
"""

from __future__ import annotations

import torch

from bench.ops.case import Case, Random, compare
from bench.record import Check
from longshadow.engine.ops import operators as choose_operators
from longshadow.engine.ops.backend import REFERENCE, Operators
from longshadow.engine.ops.rotary import RotaryStyle
from longshadow.engine.ops.summarize_keys import summarize_keys_workspace

# The Gram matrix's entries are fp32 sums of bf16 products; some keys round to bf16 differently.
TOLERANCE = 1e-3
CONTEXTS = {"16K": 16 * 1024, "60K": 60 * 1024, "122K": 122 * 1024}


def cases() -> tuple[Case, ...]:
    """One prompt of several lengths."""
    return tuple(Case(name=name, batch_size=1, context_tokens=tokens) for name, tokens in CONTEXTS.items())


class SummarizeKeys:
    """The operator over the prompts of some layers; see `bench.ops.case.Work`."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        random = Random(device, seed)
        self._case = case
        heads, tokens, head_dim = case.num_kv_heads, case.context_tokens, case.head_dim
        width, num_chunks, element = heads * head_dim, case.num_chunks, case.dtype.itemsize
        angle_bytes, landmark_bytes = tokens * head_dim * element, heads * num_chunks * (head_dim + 1) * 4
        layer_bytes = 2 * tokens * width * element + angle_bytes + landmark_bytes + 2 * 4 * width**2
        self.num_layers = case.num_layers(layer_bytes)
        self.num_bytes = self.num_layers * layer_bytes
        self.flops = self.num_layers * tokens * width * (width + 1)
        self._keys = [self._make_keys(random) for _ in range(self.num_layers)]
        angles = random.normal(tokens, head_dim // 2, dtype=torch.float32).mul_(100)
        self._angles = angles.cos().to(case.dtype), angles.sin().to(case.dtype)

        def floats(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self._plain = torch.empty(tokens, width, dtype=case.dtype, device=device)
        self._summary = (floats(heads, num_chunks, head_dim), floats(heads, num_chunks))
        self._sums = (floats(width, width), floats(width))
        self._workspace = floats(summarize_keys_workspace(heads, tokens, head_dim, case.chunk_size))

    def _make_keys(self, random: Random) -> torch.Tensor:
        """As models leave them: the heads of a token side by side."""
        case = self._case
        shape = (case.context_tokens, case.num_kv_heads, case.head_dim)
        return random.normal(*shape, dtype=case.dtype).transpose(0, 1)

    def run(self, operators: Operators) -> None:
        """One call per layer."""
        for keys in self._keys:
            self._call(operators, keys)

    def _call(self, operators: Operators, keys: torch.Tensor) -> None:
        how = (int(RotaryStyle.HALF), self._case.head_dim, self._case.chunk_size, None)
        operators.summarize_keys(keys, *self._angles, *how, self._plain, *self._summary, *self._sums, self._workspace)

    def check(self, operators: Operators) -> Check:
        """The Gram matrix, landmarks and cosines of the first layer against the reference's."""
        results = []
        for side in (operators, choose_operators(self._plain.device, REFERENCE)):
            for total in self._sums:
                total.zero_()
            self._call(side, self._keys[0])
            results.append([part.clone() for part in (self._sums[0], *self._summary)])
        names = ("Gram matrix", "landmarks", "cosines")
        checks = [compare(*pair, TOLERANCE, name) for *pair, name in zip(*results, names, strict=True)]
        return next((check for check in checks if not check.passed), checks[0])


def make(case: Case, device: torch.device, seed: int) -> SummarizeKeys:
    """The operator's work on random keys."""
    return SummarizeKeys(case, device, seed)
