"""Package layout and the optional CUDA extension; everything else about the project stands in pyproject.toml.

`src/longshadow` is the import root, and two committed links in it, `engine` and `compress`, lead to the
top-level folders of the same names.

The extension, longshadow._C, is built only where the environment says LONGSHADOW_BUILD_CUDA=1: it needs nvcc and the
torch it will run with (`pip install --no-build-isolation`, or `make extension` in a checkout). TORCH_CUDA_ARCH_LIST
chooses its architectures. Without it the package is complete.
"""

import os
import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LINKED = ("engine", "compress")
BUILD_VARIABLE = "LONGSHADOW_BUILD_CUDA"
EXTENSION = "longshadow._C"


def package_layout() -> tuple[dict[str, str], list[str]]:
    """`package_dir` and `packages`: through the links where they are intact, otherwise mapped by hand."""
    source = ROOT / "src" / "longshadow"
    if all((source / name / "__init__.py").is_file() for name in LINKED):
        return {"": "src"}, find_packages("src")
    # An archive or a checkout without support for links leaves text files in their place.
    package_dir = {"": "src", **{f"longshadow.{name}": name for name in LINKED}}
    below = [f"{name}.{package}" for name in LINKED for package in find_packages(name)]
    return package_dir, ["longshadow", *(f"longshadow.{package}" for package in [*LINKED, *below])]


class BuildCuda(build_ext):
    """Compiles all sources with nvcc, side by side, and links them."""

    def build_extension(self, extension: Extension) -> None:
        # A source distribution has no top-level engine/, and a checkout without links no other.
        found = next(path for path in (ROOT / "engine", ROOT / "src" / "longshadow" / "engine") if path.is_dir())
        nvcc: dict[str, Any] = runpy.run_path(str(found / "ops" / "nvcc.py"))
        reason = nvcc["why_not"]()
        if reason is not None:
            raise SystemExit(f"error: {EXTENSION} cannot be built: {reason}")
        architectures = nvcc["architectures_in"](os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
        target = Path(self.get_ext_fullpath(extension.name))
        folder = Path(self.build_temp)
        for needed in (target.parent, folder):
            needed.mkdir(parents=True, exist_ok=True)
        sources = [Path(source) for source in extension.sources]
        objects = [folder / f"{source.name}.o" for source in sources]
        commands = [
            nvcc["compile_command"](source, output, architectures or nvcc["ARCHITECTURES"])
            for source, output in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._run, commands))
        self._run(nvcc["link_command"](objects, target))

    def _run(self, command: list[str]) -> None:
        print(*command, flush=True)
        subprocess.run(command, check=True)


def cuda_extension() -> dict[str, Any]:
    """What the extension adds to the arguments of `setup`: nothing unless it is asked for."""
    if os.environ.get(BUILD_VARIABLE) != "1":
        return {}
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.c*"))
    return {
        "ext_modules": [Extension(EXTENSION, sources, py_limited_api=True)],
        "cmdclass": {"build_ext": BuildCuda},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


package_dir, packages = package_layout()
setup(
    package_dir=package_dir,
    packages=packages,
    package_data={"longshadow": ["py.typed", "*.pyi"], "longshadow.engine.serving": ["page.html"]},
    **cuda_extension(),
)
