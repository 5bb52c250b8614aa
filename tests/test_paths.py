"""Every command looks at where it is to write before it does anything else, and makes no folder unasked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longshadow.cli import app
from longshadow.paths import check_output, check_output_file, check_output_folder

ROOT = Path(__file__).resolve().parent.parent
# The option that says where to write comes last.
COMMANDS = [
    "generate --model none/such --input IN --output",
    "serve none/such --documents-dir",
    "compensate none/such --quantized none/such --output",
    "adapter merge none/such none/such --output",
    "adapter export none/such --to padded --output",
    "adapter export none/such --to gguf --output",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_folder_is_named_and_not_made(command: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_text('{"prompt": "a"}')
    (tmp_path / "file").write_text("")
    words = [str(source) if word == "IN" else word for word in command.split()]
    for target, reason in (("none/out", "none does not exist"), ("file/out", "file is no folder")):
        result = CliRunner().invoke(app, [*words, str(tmp_path / target)])
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr.startswith(f"error: {words[-1]} {tmp_path / target}: the folder {tmp_path}")
        assert reason in result.stderr and len(result.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "in"]


def test_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert check_output_file(file, "--output") == file
    assert check_output_folder(tmp_path / "new", "--output") == tmp_path / "new"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output(Path("~/x"), "--output") == tmp_path / "x"
    with pytest.raises(ValueError, match=r"--output .* it is a folder, and must be a file"):
        check_output_file(tmp_path, "--output")
    with pytest.raises(ValueError, match=r"--output .* it is a file, and must be a folder"):
        check_output_folder(file, "--output")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match="nothing can be written in the folder"):
        check_output(file, "--output")
    monkeypatch.setattr(os, "access", lambda path, mode: path != file)
    with pytest.raises(ValueError, match="it cannot be written to"):
        check_output(file, "--output")


def test_a_command_without_standard_input(tmp_path: Path) -> None:
    code = "from longshadow.cli import app; app()"
    command = [sys.executable, "-c", code, "generate", "--model", "demo", "--prompt-file", "-"]
    closed = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *command],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert closed.returncode == 2 and closed.stdout == ""
    assert closed.stderr == "error: cannot read the prompt file standard input: it is closed; pipe a text into it\n"
