"""`longshadow adapter verify --run`: base and adapter loaded by the runtimes that are installed, beside PEFT.

The measure is what the adapter changes: differences of tokens' log-probabilities with and without it. Runtimes round in
their own ways, which both have in common.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longshadow.compress.adapters.reading import Adapter
from longshadow.compress.adapters.runtimes.verdicts import Verdict
from longshadow.compress.adapters.runtimes.vllm_rules import vllm_rank

if TYPE_CHECKING:
    from longshadow.compress.adapters.bases import Base
    from longshadow.compress.adapters.comparison import TokenLogprobs

logger = logging.getLogger(__name__)

PACKAGES = {"vLLM": "vllm", "llama.cpp": "llama_cpp"}
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
TIMEOUT = 3600
# Of the adapter's effect: another scale or a layer left out makes more, rounding less.
TOLERANCE = 0.1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The verdict of a run in a runtime; `serves` is None where it does not tell."""

    serves: bool | None
    told: str


def run_runtimes(
    verdicts: list[Verdict], adapter: Adapter, base: "Base", expected: "TokenLogprobs", dtype: str
) -> list[Verdict]:
    """The verdicts with what came out where a runtime is installed; a run counts for more than rules.

    Args:
        expected: of PEFT, on the same base in `dtype`.
    """
    return [_with_outcome(verdict, adapter, base, expected, dtype) for verdict in verdicts]


def _with_outcome(verdict: Verdict, adapter: Adapter, base: "Base", expected: "TokenLogprobs", dtype: str) -> Verdict:
    if verdict.runtime == "PEFT":
        return replace(verdict, ran="with the logits of the factors")
    if verdict.runtime not in PACKAGES:
        return replace(verdict, ran="not run: no way to run it is known here")
    if find_spec(PACKAGES[verdict.runtime]) is None:
        return replace(verdict, ran="not run: it is not installed here")
    logger.info("running %s", verdict.runtime)
    with tempfile.TemporaryDirectory(prefix="longshadow-") as name:
        try:
            request = _request(verdict.runtime, adapter, base, Path(name))
        except ValueError as error:
            return replace(verdict, ran=f"not run: {error}")
        request |= {"runtime": verdict.runtime, "dtype": dtype, "ids": expected.ids}
        outcome = judged(_result(request, Path(name)), expected)
    return replace(verdict, serves=verdict.serves if outcome.serves is None else outcome.serves, ran=outcome.told)


def _request(runtime: str, adapter: Adapter, base: "Base", folder: Path) -> dict[str, Any]:
    """Raises ValueError where the runtime has no use for the base or the adapter as they are."""
    if runtime == "vLLM":
        size = vllm_rank(max(adapter.rank, int(adapter.config.get("r", 8))))
        if size is None or base.method == "gguf":
            raise ValueError("the rank is beyond its largest" if size is None else "it loads no GGUF files")
        return {"base": base.name, "adapter": str(adapter.folder.resolve()), "rank": size}
    from longshadow.compress.adapters.gguf_export import export_gguf

    if base.method != "gguf":
        raise ValueError("it needs the base as a GGUF file: give that with --base")
    export_gguf(adapter, base, folder / "adapter.gguf")
    return {"base": base.name, "adapter": str(folder / "adapter.gguf"), "rank": adapter.rank}


def _result(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    asked, answered, log = folder / "request.json", folder / "result.json", folder / "log"
    asked.write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-m", "longshadow.compress.adapters.runtimes.worker", str(asked), str(answered)]
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=output, env=SETTINGS | dict(os.environ), timeout=TIMEOUT
            ).returncode
        except subprocess.TimeoutExpired:
            return {"stage": "base", "error": f"nothing came of it in {TIMEOUT} s"}
    if not answered.is_file():
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return {"stage": "base", "error": f"it ended with code {code}: {lines[-1].strip() if lines else 'in silence'}"}
    found: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    return found


def judged(result: dict[str, Any], expected: "TokenLogprobs") -> Outcome:
    """A run beside PEFT's log-probabilities.

    Args:
        result: what the worker wrote.
    """
    name = f"version {result['version']}" if "version" in result else "it"
    if "error" in result:
        if result["stage"] == "adapter":
            return Outcome(serves=False, told=f"{name} refuses the adapter ({result['error']})")
        return Outcome(serves=None, told=f"{name} could not run the base ({result['error']})")
    plain, adapted = result["plain"], result["adapted"]
    apart = _largest(plain, expected.plain)
    effect, wanted = _largest(adapted, plain), _largest(expected.adapted, expected.plain)
    changes = [a - p for a, p in zip(adapted, plain, strict=True)]
    expected_changes = [a - p for a, p in zip(expected.adapted, expected.plain, strict=True)]
    difference = _largest(changes, expected_changes)
    numbers = f"the adapter changes log-probabilities by {effect:.2g}, with PEFT {wanted:.2g}, {difference:.1g} apart"
    if wanted < 10 * apart:
        return Outcome(
            serves=None, told=f"{name}: {numbers}; the base's own are {apart:.1g} apart, too much to tell by"
        )
    if effect < TOLERANCE * wanted:
        return Outcome(serves=False, told=f"{name} loads it, and it does nothing: {numbers}")
    if difference > TOLERANCE * wanted:
        return Outcome(serves=False, told=f"{name} makes something else of it: {numbers}")
    return Outcome(serves=True, told=f"{name}: {numbers}")


def _largest(first: Sequence[float], second: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))
