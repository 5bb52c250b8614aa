"""Judges which runtimes can serve an adapter on its base."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longshadow.compress.adapters.reading import Adapter
from longshadow.compress.adapters.runtimes.answers import Answer, not_known
from longshadow.compress.adapters.runtimes.llama_cpp_rules import llama_cpp_answer
from longshadow.compress.adapters.runtimes.peft_rules import peft_answer
from longshadow.compress.adapters.runtimes.sglang_rules import sglang_answer
from longshadow.compress.adapters.runtimes.vllm_rules import vllm_answer

if TYPE_CHECKING:
    from longshadow.compress.adapters.bases import Base

RULES: dict[str, Callable[[Adapter, "Base"], Answer]] = {
    "PEFT": peft_answer,
    "vLLM": vllm_answer,
    "SGLang": sglang_answer,
    "llama.cpp": llama_cpp_answer,
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One runtime.

    Attributes:
        serves: None where its rules do not tell.
        line: what to run, or why it cannot.
        ran: what came out when it was run here; None where it was not.
    """

    runtime: str
    serves: bool | None
    line: str
    ran: str | None = None


def verdicts(adapter: Adapter, base: "Base | None", fault: str | None = None) -> list[Verdict]:
    """One of each runtime.

    Args:
        base: without it, rules can only exclude.
        fault: what is wrong with the adapter, or with it on that base; no runtime serves it then for all we know.
    """
    found = []
    for runtime, rule in RULES.items():
        answer = rule(adapter, base) if base is not None else _without_base(adapter)
        if fault is not None:
            answer = answer.unsure(f"unless this is mended ({fault})")
        found.append(Verdict(runtime=runtime, serves=answer.serves, line=answer.line))
    return found


def _without_base(adapter: Adapter) -> Answer:
    named = f"its base, {adapter.base_model}, is not here" if adapter.base_model else "it does not name its base"
    return not_known(f"{named}: give the base with --base")
