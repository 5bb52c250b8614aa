"""`longshadow adapter verify`: what can be wrong with an adapter without any runtime noticing."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from longshadow.compress.adapters.description import describe
from longshadow.compress.adapters.installing import misfits
from longshadow.compress.adapters.reading import Adapter
from longshadow.compress.adapters.runtimes import Verdict, verdicts
from longshadow.compress.adapters.runtimes.running import run_runtimes
from longshadow.compress.report import REPORT
from longshadow.models import empty_model

if TYPE_CHECKING:
    from longshadow.compress.adapters.bases import Base
    from longshadow.compress.adapters.comparison import Comparison
    from longshadow.models import LoadedModel

Result = Literal["ok", "note", "failed"]
NEGLIGIBLE = 10


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check; a `note` is worth knowing and no fault."""

    name: str
    result: Result
    detail: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """All checks, and which runtimes serve the adapter."""

    checks: list[Check]
    runtimes: list[Verdict]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.result != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"passed": self.passed} | asdict(self)


def verify_adapter(
    adapter: Adapter, base: "Base | None", loaded: "LoadedModel | None" = None, *, run: bool = False
) -> Verification:
    """Checks an adapter that could be read, so that its names, shapes and ranks fit each other.

    Args:
        base: what is known of the base; None leaves open which runtimes serve the adapter.
        loaded: the base itself, to compare PEFT's logits with, which must be installed; it is PEFT's afterwards.
        run: load both in the other runtimes that are installed, too, unless PEFT's logits are wrong; for `base` and
            `loaded`.
    """
    rules: list[Callable[[Adapter], Check]] = [_plain, _scales, _numbers, _dtypes, _targets]
    checks = [rule(adapter) for rule in rules]
    comparison: Comparison | None = None
    if loaded is not None:
        checks.append(_fits(adapter, loaded.model, loaded.name))
        if checks[-1].result == "ok" and not adapter.oddities:
            check, comparison = _computes(adapter, loaded)
            checks.append(check)
    elif base is not None and (model := _without_weights(base)) is not None:
        checks.append(_fits(adapter, model, base.name))
    fault = next((check.detail for check in checks if check.result == "failed"), None)
    runtimes = verdicts(adapter, base, fault)
    if run and base is not None and comparison is not None and fault is None:
        runtimes = run_runtimes(runtimes, adapter, base, comparison.tokens, comparison.dtype)
    return Verification(checks=checks, runtimes=runtimes)


def known_base(adapter: Adapter) -> "Base | None":
    """The base that the adapter names, where its configuration lies on this machine."""
    from longshadow.compress.adapters.bases import base_of

    try:
        return base_of(adapter, only_here=True)
    except ValueError:
        return None


def _without_weights(base: "Base") -> nn.Module | None:
    """The base by its configuration alone; None where transformers cannot make it so."""
    try:
        return empty_model(base.name, only_here=True)
    except ValueError:
        return None


def _plain(adapter: Adapter) -> Check:
    meanings = "; ".join(oddity.meaning for oddity in adapter.oddities)
    detail = f"PEFT alone computes it: {meanings}" if meanings else "nothing but B A x, added to linear layers"
    return Check(name="form", result="note" if meanings else "ok", detail=detail)


def _scales(adapter: Adapter) -> Check:
    smallest, largest = describe(adapter).total.scales
    if smallest == largest == 1:
        return Check(name="scale", result="ok", detail="1 in every layer")
    scales = f"{smallest:g}" if smallest == largest else f"{smallest:g} to {largest:g}"
    # Factors of a compensation are what the residual asks for; no other scale is right.
    compensates = (adapter.folder / REPORT).exists()
    meaning = "the scale of a compensation must be 1" if compensates else "right for a LoRA that was trained so"
    return Check(name="scale", result="failed" if compensates else "note", detail=f"{scales}: {meaning}")


def _numbers(adapter: Adapter) -> Check:
    for name in adapter.layers:
        factors = adapter.factors(name)
        if not (factors.lora_b.isfinite().all() and factors.lora_a.isfinite().all()):
            return Check(name="values", result="failed", detail=f"{name} has factors that are not finite")
    return Check(name="values", result="ok", detail="all finite")


def _dtypes(adapter: Adapter) -> Check:
    dtypes = describe(adapter).total.dtypes
    return Check(name="dtype", result="ok" if len(dtypes) == 1 else "note", detail=", ".join(dtypes))


def _targets(adapter: Adapter) -> Check:
    """PEFT drops the factors of a layer that is no target, with a warning."""
    targets = adapter.config.get("target_modules") or []
    for name in adapter.layers:
        if not _is_target(name, targets):
            detail = f"target_modules does not name {name}: PEFT leaves its factors out"
            return Check(name="targets", result="failed", detail=detail)
    return Check(name="targets", result="ok", detail=f"target_modules names all {len(adapter.layers)} layers")


def _is_target(name: str, targets: str | list[str]) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _fits(adapter: Adapter, model: nn.Module, name: str) -> Check:
    problems = misfits(model, adapter)
    if problems:
        more = f", and {len(problems) - 1} more such" if len(problems) > 1 else ""
        return Check(name="base", result="failed", detail=f"{name} is another model: {problems[0]}{more}")
    return Check(name="base", result="ok", detail=f"{name} has all {len(adapter.layers)} layers in their shapes")


def _computes(adapter: Adapter, loaded: "LoadedModel") -> "tuple[Check, Comparison | None]":
    from longshadow.compress.adapters.comparison import compare_with_peft

    try:
        found = compare_with_peft(loaded.model, adapter)
    except ValueError as error:
        return Check(name="logits", result="failed", detail=str(error)), None
    told = (
        f"PEFT's logits in {found.dtype} differ by {found.difference:.1e} of the largest logit from the base's with "
        f"B A x (at most {found.tolerance:.2g}); the adapter changes them by {found.effect:.1e}"
    )
    result: Result = "ok" if found.agrees else "failed"
    if found.agrees and found.effect < NEGLIGIBLE * found.tolerance:
        result, told = "note", f"{told}, which is too little to compare in this dtype: try --dtype float32"
    return Check(name="logits", result=result, detail=told), found
