"""Every CUDA C++ source compiles, host and device code, and together they link to the extension.

Against the headers of whatever torch is installed, for one architecture; `make evidence` compiles for all.
"""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longshadow.engine.ops import nvcc
from tests.engine.ops.checks import run_compiler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(nvcc.why_not() is not None, reason=f"cannot compile: {nvcc.why_not()}"),
]
ARCHITECTURE = "90"


def compiled(source: Path, folder: Path, *, cubin: bool = False) -> Path:
    output = folder / f"{source.name}.o"
    command = nvcc.compile_command(source, output, [ARCHITECTURE], cubin=cubin)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return output


def test_sources_compile_and_link(tmp_path: Path) -> None:
    sources = [*nvcc.cuda_sources(), nvcc.SOURCES / "bindings.cpp"]
    assert {source.stem for source in sources} >= {"top_chunks", "plan_chunks", "fetch_values"}
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: compiled(source, tmp_path), sources))
    package = tmp_path / "longshadow"
    package.mkdir()
    subprocess.run(nvcc.link_command(objects, package / "_C.abi3.so"), check=True)
    # With a torch that was built without CUDA it cannot be loaded, and says so instead of raising.
    code = f"""
import torch, longshadow
longshadow.__path__.append({str(package)!r})
from longshadow.engine.ops.extension import why_not
print(why_not(torch.device("cuda", 0)), torch.version.cuda)
"""
    reason, cuda = run_compiler(code).rsplit(maxsplit=1)
    assert reason == "None" if cuda != "None" else "cannot be loaded with torch" in reason


def test_a_cubin_is_of_one_architecture(tmp_path: Path) -> None:
    source = nvcc.SOURCES / "device.cu"
    assert compiled(source, tmp_path, cubin=True).read_bytes().startswith(b"\x7fELF")
    with pytest.raises(ValueError, match="for one architecture, got 2"):
        nvcc.compile_command(source, tmp_path / "two", ["80", "90"], cubin=True)
