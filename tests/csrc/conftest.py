"""The index logic of the CUDA kernels, compiled for the CPU with every check that the compiler has."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from longshadow.engine.ops.nvcc import SOURCES

COMPILER = "g++"
OPTIONS = ("-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS")
HEADERS = Path(torch.__file__).parent / "include"


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """`host_library.cpp` as a shared library that ends the process when it does something undefined."""
    library = tmp_path_factory.mktemp("host") / "library.so"
    build("host_library.cpp", library, "-shared", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover")
    return ctypes.CDLL(str(library))


@pytest.fixture
def device_block_check(tmp_path: Path) -> Path:
    """`device_block_check.cpp` as a program that fails when threads race."""
    program = tmp_path / "device_block_check"
    build("device_block_check.cpp", program, "-pthread", "-fsanitize=thread", "-Wno-unknown-pragmas")
    return program


def build(source: str, output: Path, *options: str) -> None:
    """Compiles a source of this folder; skips the test where there is no compiler."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no {COMPILER}")
    includes = (f"-I{SOURCES}", "-isystem", str(HEADERS))
    command = [COMPILER, *OPTIONS, *options, *includes, str(Path(__file__).with_name(source)), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
