"""Runtimes that serve adapters: what their loaders do with this adapter on this base, read in their code or run."""

from longshadow.compress.adapters.runtimes.verdicts import Verdict, verdicts
from longshadow.compress.adapters.runtimes.vllm_rules import VLLM_RANKS, vllm_rank

__all__ = ["VLLM_RANKS", "Verdict", "verdicts", "vllm_rank"]
