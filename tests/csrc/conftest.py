"""The index logic of the CUDA kernels, compiled for the CPU with every check that the compiler has."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from longshadow.engine.ops.nvcc import SOURCES

COMPILER = "g++"
OPTIONS = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS")
SANITISER = ("-fsanitize=undefined", "-fno-sanitize-recover")


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """`host_library.cpp` as a shared library."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no {COMPILER}")
    import torch

    headers = Path(torch.__file__).parent / "include"
    library = tmp_path_factory.mktemp("host") / "library.so"
    source = Path(__file__).with_name("host_library.cpp")
    includes = (f"-I{SOURCES}", "-isystem", str(headers))
    command = [COMPILER, *OPTIONS, *SANITISER, *includes, "-shared", "-fPIC", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))
