"""Finished blocks of a run on disk, so that an interrupted one goes on where it was."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longshadow.compress.adapters.atomic import whole_folder

FORMAT = 1
MANIFEST = "manifest.json"


class Shards:
    """A folder with one safetensors file per finished piece of work, written whole or not at all."""

    def __init__(self, folder: Path, key: str) -> None:
        """Opens what a run with the same key has left, or begins.

        Args:
            folder: made when it is not there.
            key: says everything that the pieces depend on.

        Raises ValueError where the folder is another run's, or no run's.
        """
        self.folder = folder
        expected = {"format": FORMAT, "key": key}
        if not folder.exists():
            with whole_folder(folder) as partial:
                (partial / MANIFEST).write_text(json.dumps(expected), encoding="utf-8")
        elif _read(folder / MANIFEST) != expected:
            raise ValueError(
                f"{folder} holds an unfinished run with other models, texts or settings: repeat that command to "
                "finish it, or delete the folder"
            )

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], Any] | None:
        """Tensors and facts of a finished piece; None where it is not finished, or was damaged since."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
                return tensors, json.loads(file.metadata()["facts"])
        except SafetensorError:
            return None

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Any) -> None:
        """Keeps a finished piece; `facts` must be JSON."""
        partial = self._path(name).with_suffix(".partial")
        save_file(
            {key: tensor.contiguous().cpu() for key, tensor in tensors.items()},
            partial,
            metadata={"facts": json.dumps(facts)},
        )
        partial.replace(self._path(name))

    def discard(self) -> None:
        """Deletes the folder, once the result is elsewhere."""
        shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _read(manifest: Path) -> Any:
    """None for one that is missing or damaged."""
    try:
        return json.loads(manifest.read_bytes())
    except (OSError, ValueError):
        return None
