"""The package as it is installed: its links, its lazy names, its versions, its report."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import longshadow
from longshadow import env

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "triton", "numpy")


def run_python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter that runs `code` in the repository's root."""
    paths = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=paths | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("name", ["engine", "compress"])
def test_links_lead_to_the_top_level_folders(name: str) -> None:
    link = ROOT / "src" / "longshadow" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name
    assert link.readlink() == Path("../..") / name, "an absolute link works in one checkout only"


@pytest.mark.parametrize("name", ["engine", "compress"])
def test_bare_import_is_refused(name: str) -> None:
    code = f"""
try:
    import {name}
except ImportError as error:
    print(error)
"""
    assert run_python(code).strip() == f"import longshadow.{name}, not {name}"


@pytest.mark.parametrize("module", ["longshadow", "longshadow.env", "longshadow.cli"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_help_loads_nothing_heavy() -> None:
    code = f"""
import sys
from longshadow.cli import app
sys.argv = ["longshadow", "generate", "--help"]
try:
    app()
except SystemExit as stop:
    print("exit code", stop.code, [name for name in {HEAVY} if name in sys.modules])
"""
    assert run_python(code).splitlines()[-1] == "exit code 0 []"


def test_public_names_are_those_of_their_packages() -> None:
    from longshadow.compress import pipeline
    from longshadow.engine import prefix_sharing, runtime, shadowkv
    from longshadow.engine.prefix_sharing import trainers

    for name in set(longshadow.__all__) - {"__version__"}:
        assert name in dir(longshadow)
        # Some of these packages import their own names when they are first used, too.
        [*homes] = {
            getattr(home, name)
            for home in (pipeline, trainers, prefix_sharing, runtime, shadowkv)
            if hasattr(home, name)
        }
        assert homes == [getattr(longshadow, name)]


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ShadowCache'"):
        _ = longshadow.ShadowCache


def test_installed_version_is_the_sources() -> None:
    assert importlib.metadata.version("longshadow") == longshadow.__version__


def test_cache_folder_follows_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LONGSHADOW_CACHE", raising=False)
    assert env.cache_folder() == tmp_path / ".cache" / "longshadow"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert env.cache_folder() == tmp_path / ".cache" / "longshadow"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert env.cache_folder() == tmp_path / "shared" / "longshadow"
    monkeypatch.setenv("LONGSHADOW_CACHE", "~/mine")
    assert env.cache_folder() == tmp_path / "mine"


def test_report_names_versions_and_machine() -> None:
    facts = env.facts()
    assert facts["longshadow"] == longshadow.__version__
    assert facts["torch"] == importlib.metadata.version("torch")
    assert facts.keys() >= {
        "commit",
        "python",
        "cpu",
        "memory",
        "cuda",
        "driver",
        "flash-attn",
        "LONGSHADOW_CACHE",
    }


def test_report_survives_a_machine_without_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("broken\non purpose")

    for module, name in [
        (env.subprocess, "run"),
        (env.platform, "platform"),
        (env.os, "sysconf"),
        (env.importlib.metadata, "version"),
    ]:
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setitem(sys.modules, "torch", None)
    report = env.report()
    assert "platform: unknown (OSError: broken on purpose)" in report
    assert "memory: unknown" in report
