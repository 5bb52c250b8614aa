"""Checks where a command is to write before any work; makes no folder that nobody asked for."""

import os
from pathlib import Path


def check_output(path: Path, option: str) -> Path:
    """A path below a folder that is there, with ~ as the user's. Raises ValueError where nothing can be written."""
    target = Path(os.path.expanduser(path))  # of an unknown ~user it makes nothing else
    parent = target.absolute().parent
    if not parent.is_dir():
        what = "is no folder" if parent.exists() else "does not exist: make it first"
        raise ValueError(f"{option} {path}: the folder {parent} {what}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: nothing can be written in the folder {parent}")
    if target.exists() and not os.access(target, os.W_OK):
        raise ValueError(f"{option} {path}: it cannot be written to")
    return target


def check_output_file(path: Path, option: str) -> Path:
    """The same for a file, which may be there."""
    target = check_output(path, option)
    if target.is_dir():
        raise ValueError(f"{option} {path}: it is a folder, and must be a file")
    if target.exists() and not target.is_file():
        raise ValueError(f"{option} {path}: it is a device or a pipe, and must be a file")
    return target


def check_output_folder(path: Path, option: str) -> Path:
    """The same for a folder, which may be there, and is made otherwise."""
    target = check_output(path, option)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{option} {path}: it is a file, and must be a folder")
    return target
