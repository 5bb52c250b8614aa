"""`python -m bench.kernels`: compiles every kernel ahead of time and records what the compilers made of it.

For each shipped configuration of each Triton kernel, and each CUDA C++ source, on each architecture: registers of a
thread, bytes that spill to local memory, and a block's shared memory, read from the cubin with `cuobjdump -res-usage`.
No GPU is needed. The record is docs/kernels.json, its table docs/kernels.md. A kernel whose sources have not changed
since it was recorded is not compiled again; `--all` compiles everything, `--check` records nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.revision import REPOSITORY
from longshadow.engine.ops import nvcc

RECORD = REPOSITORY / "docs" / "kernels.json"
TABLE = REPOSITORY / "docs" / "kernels.md"
OPERATORS = REPOSITORY / "engine" / "ops"
ARCHITECTURES = (80, 90, 100)
# Where nothing may spill.
FULL_REGISTERS = (80, 90)
SHARED_MEMORY = 99 * 1024
RESOURCES = re.compile(r"Function\s+(\S+):\s*\n\s*REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Of one kernel on one architecture: registers of a thread, spilled bytes of a thread, shared bytes of a block."""

    registers: int
    spilled: int
    shared: int


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is compiled at once: one configuration of a Triton kernel, or one CUDA C++ source.

    Attributes:
        name: "<operator>, <configuration>" or "csrc/<operator>.cu".
        source: hash of everything that decides the result.
        compiled: Triton's `Configuration`, or the path of the source.
        minimum: the earliest architecture it is meant for.
    """

    name: str
    source: str
    compiled: Any
    minimum: int


def triton_units() -> Iterator[Unit]:
    """All shipped configurations, by operator."""
    for path in sorted(OPERATORS.glob("*/triton_kernel.py")):
        module = importlib.import_module(f"longshadow.engine.ops.{path.parent.name}.triton_kernel")
        for configuration in module.CONFIGURATIONS:
            decided = repr((configuration.kernel.cache_key, *configuration[2:]))
            yield Unit(
                name=f"{path.parent.name}, {configuration.name}",
                source=_hash(decided.encode()),
                compiled=configuration,
                minimum=configuration.minimum_capability,
            )


def cuda_units() -> Iterator[Unit]:
    """All CUDA C++ sources; each also depends on every header beside it."""
    headers = b"".join(path.read_bytes() for path in sorted(nvcc.SOURCES.glob("*.h")))
    for path in nvcc.cuda_sources():
        yield Unit(name=f"csrc/{path.name}", source=_hash(path.read_bytes() + headers), compiled=path, minimum=80)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def compile_unit(unit: Unit, architecture: int) -> dict[str, Usage]:
    """Usage by kernel name; a source may hold several kernels."""
    if isinstance(unit.compiled, Path):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            command = nvcc.compile_command(unit.compiled, cubin, [str(architecture)], cubin=True)
            subprocess.run(command, check=True)
            return read_usage(cubin)
    from longshadow.engine.ops.configuration import compile_ahead_of_time

    kernel = compile_ahead_of_time(unit.compiled, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        [usage] = read_usage(Path(file.name)).values()
    # The cubin knows of static shared memory only, and Triton's is dynamic.
    shared = max(usage.shared, int(kernel.metadata.shared))
    return {kernel.metadata.name: Usage(registers=usage.registers, spilled=usage.spilled, shared=shared)}


def read_usage(cubin: Path) -> dict[str, Usage]:
    """By kernel, as `cuobjdump -res-usage` prints it."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    output = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    return {
        readable(name): Usage(registers=int(registers), spilled=int(stack) + int(local), shared=int(shared))
        for name, registers, stack, shared, local in RESOURCES.findall(output)
    }


def readable(symbol: str) -> str:
    """A kernel's own name and template arguments; mangled C++ names hold hashes that change with the architecture."""
    if not symbol.startswith("_Z"):
        return symbol
    rest, name = symbol.removeprefix("_Z").removeprefix("N"), symbol
    while found := re.match(r"\d+", rest):
        stop = found.end() + int(found.group())
        name, rest = rest[found.end() : stop], rest[stop:]
    arguments = re.match(r"I(\w+?)EE?v", rest)
    return f"{name}<{arguments.group(1)}>" if arguments else name


def find_faults(name: str, architecture: int, usage: Usage) -> list[str]:
    """What is wrong with a kernel, in words."""
    faults = []
    if usage.spilled and architecture in FULL_REGISTERS:
        faults.append(f"{name} spills {usage.spilled} bytes on sm_{architecture}")
    if usage.shared > SHARED_MEMORY:
        faults.append(f"{name} takes {usage.shared} bytes of shared memory on sm_{architecture}")
    return faults


def read_record() -> dict[str, Any]:
    """The committed record: `tools` with their versions, and `units` by name; empty before the first."""
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return record


def stale_units(units: list[Unit], recorded: dict[str, Any]) -> list[Unit]:
    """Those whose sources are not the recorded ones."""
    return [unit for unit in units if recorded.get(unit.name, {}).get("source") != unit.source]


def measure(unit: Unit) -> dict[str, Any]:
    """A unit's entry in the record. Raises RuntimeError for faults and for what does not compile."""
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for architecture in ARCHITECTURES:
        if architecture < unit.minimum:
            continue
        for name, usage in compile_unit(unit, architecture).items():
            faults = find_faults(f"{unit.name}: {name}", architecture, usage)
            if faults:
                raise RuntimeError("; ".join(faults))
            kernels.setdefault(name, {})[f"sm_{architecture}"] = asdict(usage)
    return {"source": unit.source, "kernels": kernels}


def render(record: dict[str, Any]) -> str:
    """The record as a page."""
    lines = [
        "# Kernels",
        "",
        "Made by `make evidence` from every shipped configuration, compiled ahead of time, without a GPU: registers of",
        "a thread / spilled bytes of a thread / shared memory of a block.",
        "",
        "| kernel | " + " | ".join(f"sm_{it}" for it in ARCHITECTURES) + " |",
        "| --- | " + " | ".join("---:" for _ in ARCHITECTURES) + " |",
    ]
    for unit, entry in sorted(record["units"].items()):
        for kernel, by_architecture in sorted(entry["kernels"].items()):
            cells = [by_architecture.get(f"sm_{it}") for it in ARCHITECTURES]
            texts = [
                "–" if it is None else f"{it['registers']} / {it['spilled']} / {it['shared'] / 1024:.1f} KB"
                for it in cells
            ]
            lines.append(f"| {unit}: `{kernel}` | " + " | ".join(texts) + " |")
    tools = ", ".join(f"{name} {version}" for name, version in record["tools"].items())
    return "\n".join([*lines, "", f"Compiled with {tools}.", ""])


def _cell(usage: dict[str, int] | None) -> str:
    if usage is None:
        return "–"
    return f"{usage['registers']} / {usage['spilled']} / {usage['shared'] / 1024:.1f} KB"


def main(arguments: list[str] | None = None) -> int:
    """Compiles what has changed and writes the record and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="compile unchanged kernels, too")
    parser.add_argument("--check", action="store_true", help="record nothing")
    chosen = parser.parse_args(arguments)
    units = list(triton_units())
    reason = nvcc.why_not()
    if reason is None:
        units += cuda_units()
    else:
        print(f"CUDA C++ is left out: {reason}", file=sys.stderr)
    record = read_record()
    known = {} if chosen.all else record.get("units", {})
    # What cannot be compiled here stays as it was recorded.
    kept = {name: entry for name, entry in record.get("units", {}).items() if reason and name.startswith("csrc/")}
    stale = stale_units(units, known)
    tools = {**record.get("tools", {}), **compilers()}
    for number, unit in enumerate([*stale, None]):
        if unit is not None:
            print(f"[{number + 1}/{len(stale)}] {unit.name}", file=sys.stderr, flush=True)
            known[unit.name] = measure(unit)
        # Written after each, so that an interrupted run goes on where it stopped.
        entries = kept | {unit.name: known[unit.name] for unit in units if unit.name in known}
        if not chosen.check:
            write(RECORD, json.dumps({"tools": tools, "units": entries}, indent=1, sort_keys=True) + "\n")
    if not chosen.check:
        write(TABLE, render(read_record()))
    print(f"{len(units)} units, {len(stale)} compiled now", file=sys.stderr)
    return 0


def compilers() -> dict[str, str]:
    """Names and versions of those that are installed."""
    import triton

    found = {"triton": str(triton.__version__)}
    compiler = nvcc.find_nvcc()
    if compiler is not None:
        text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        found["nvcc"] = text.split("release ")[1].split(",")[0]
    return found


def write(path: Path, text: str) -> None:
    """The whole file or nothing of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
