"""How the CUDA C++ sources are compiled: together as the extension, or one by one to look at their machine code.

Only the standard library is imported, and nothing of the package: setup.py reads this file before there is one.
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

# Beside the top-level engine/ of a checkout; a source distribution has engine/ in src/longshadow/ only.
_FOLDERS = [Path(__file__).resolve().parents[levels] / "csrc" for levels in (2, 4)]
SOURCES = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
# As nvcc names them: 8.6 and 8.9 run the code for 8.0, and what is newer compiles the last one's PTX.
ARCHITECTURES = ("80", "90", "100+PTX")
# torch's stable ABI as of 2.11: one build serves that version and later ones.
DEFINES = ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA")
OPTIONS = ("-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-Wall")
DEFAULT_HOME = Path("/usr/local/cuda")


def cuda_sources() -> list[Path]:
    """The files with kernels, in the order of their names."""
    return sorted(SOURCES.glob("*.cu"))


def find_nvcc() -> Path | None:
    """The compiler: CUDA_HOME's, the one on the PATH, or that of /usr/local/cuda; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    on_path = shutil.which("nvcc")
    candidates = [
        *([Path(home) / "bin" / "nvcc"] if home else []),
        *([Path(on_path)] if on_path else []),
        DEFAULT_HOME / "bin" / "nvcc",
    ]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def why_not() -> str | None:
    """Why nothing can be compiled here, None where it can."""
    if not SOURCES.is_dir():
        return "the CUDA sources are in a checkout or a source distribution only"
    if _torch_folder() is None:
        return "torch, whose headers are needed, is not installed"
    if find_nvcc() is None:
        return "there is no nvcc: not in CUDA_HOME, on the PATH, or in /usr/local/cuda"
    return None


def compile_command(
    source: Path, output: Path, architectures: Sequence[str] = ARCHITECTURES, *, cubin: bool = False
) -> list[str]:
    """The command that compiles one source, host and device code, to an object file.

    `architectures` are nvcc's, "80", "90a", "100+PTX" for PTX besides. With `cubin` it compiles the device code alone,
    for one architecture, to a file that `cuobjdump -res-usage` reads.
    """
    if cubin:
        if len(architectures) != 1:
            raise ValueError(f"a cubin is for one architecture, got {len(architectures)}")
        architecture = architectures[0]
        kind = ["-cubin", f"-arch=sm_{architecture.removesuffix('+PTX')}"]
    else:
        kind = ["-c"]
        for architecture in architectures:
            number = architecture.removesuffix("+PTX")
            code = f"[compute_{number},sm_{number}]" if number != architecture else f"sm_{number}"
            kind.append(f"-gencode=arch=compute_{number},code={code}")
    torch_headers = _installed_torch() / "include"
    folders = (torch_headers, torch_headers / "torch" / "csrc" / "api" / "include", sysconfig.get_paths()["include"])
    includes = [f"-I{folder}" for folder in folders]
    return [str(_installed_nvcc()), *OPTIONS, *DEFINES, *includes, *kind, str(source), "-o", str(output)]


def link_command(objects: Sequence[Path], output: Path) -> list[str]:
    """The command that links the extension from its object files, with the libraries of the installed torch."""
    folder = _installed_torch() / "lib"
    names = [name for name in ("torch_cpu", "torch_cuda") if (folder / f"lib{name}.so").is_file()]
    libraries = [f"-L{folder}", *(f"-l{name}" for name in names), "--cudart=shared"]
    return [str(_installed_nvcc()), "-shared", *map(str, objects), *libraries, "-o", str(output)]


def architectures_in(text: str) -> tuple[str, ...]:
    """Architectures written as in torch's TORCH_CUDA_ARCH_LIST, "8.0;9.0a 10.0+PTX", as nvcc names them."""
    return tuple(text.replace(".", "").replace(";", " ").split())


def _installed_nvcc() -> Path:
    nvcc = find_nvcc()
    assert nvcc is not None, "ask why_not() first"
    return nvcc


def _installed_torch() -> Path:
    folder = _torch_folder()
    assert folder is not None, "ask why_not() first"
    return folder


def _torch_folder() -> Path | None:
    # Without importing it, which takes a second.
    spec = importlib.util.find_spec("torch")
    locations = None if spec is None else spec.submodule_search_locations
    return Path(locations[0]) if locations else None
