"""GGUF files: loading one as a dense model, and converting one, once, to a verified safetensors folder.

A converted folder holds what `save_pretrained` writes of the model and its tokenizer, and a manifest:
    {"format": FORMAT, "source_sha256": hex, "files": {name: {"size": bytes, "sha256": hex}}}
The folder appears under its final name only when it is complete.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Of the converted folder. Before 2, a tied head was stored under the head's name, where other readers do not look.
FORMAT = 2
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"


def load_gguf(
    path: Path, *, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a GGUF file with its blocks unpacked to `dtype`.

    Raises:
        ValueError: the file is no GGUF, is damaged, or has an architecture that transformers cannot read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, attn_implementation="sdpa", **_unpacked_blocks()
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # The readers below raise whatever a damaged byte leads them to: IndexError, KeyError, struct.error, ...
    except Exception as error:
        raise ValueError(_gguf_message(path, error)) from error
    return model.to(device).eval(), tokenizer


def _unpacked_blocks() -> dict[str, Any]:
    try:
        from transformers import GgufConfig
    except ImportError:  # older transformers always unpack
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _gguf_message(path: Path, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if "architecture" in reason or "model_type" in reason:
        return (
            f"{path.name} has an architecture that transformers cannot read from a GGUF file ({reason}); "
            "use the model's safetensors version instead"
        )
    return f"{path} cannot be read as a GGUF model ({reason}); it may be damaged: download it again"


def converted_folder(source: Path, source_sha256: str, target: Path) -> Path:
    """The safetensors folder `target` made from the GGUF file `source`, converted unless it is there intact.

    Args:
        source_sha256: the hash `source` must have, in hexadecimal.

    Raises:
        ValueError: `source` is damaged, or `target` cannot be written (no permission, full disk).
    """
    if is_intact(target, source_sha256):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):
            if not is_intact(target, source_sha256):  # another process may have converted it meanwhile
                _convert(source, source_sha256, target)
    except OSError as error:
        raise ValueError(_write_message(target.parent, error)) from error
    return target


def is_intact(folder: Path, source_sha256: str) -> bool:
    """Whether `folder` was converted, in today's format, from the source with that hash, and is unchanged since."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
        made_from = (manifest["format"], manifest["source_sha256"])
        if made_from != (FORMAT, source_sha256) or WEIGHTS not in manifest["files"]:
            return False
        # All sizes first: a truncated file is found without hashing half a gigabyte.
        return all((folder / name).stat().st_size == entry["size"] for name, entry in files) and all(
            sha256(folder / name) == entry["sha256"] for name, entry in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(source: Path, source_sha256: str, target: Path) -> None:
    if sha256(source) != source_sha256:
        raise ValueError(f"{source} is damaged: its sha256 is not {source_sha256}; install or download it again")
    logger.info("converting %s to safetensors in %s (once)", source.name, target)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # we hold the lock: what lies there was left by a killed process
    try:
        partial.mkdir()
        _write_model(source, partial)
        _write_manifest(partial, source_sha256)
        _replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_model(source: Path, folder: Path) -> None:
    model, tokenizer = load_gguf(source, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer.save_pretrained(folder)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise _as_os_error(error) from error


def _as_os_error(error: SafetensorError) -> Exception:
    """safetensors reports a failed write as text, "... (os error 28)": the `OSError` it stands for."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
        if f"os error {number})" in str(error):
            return OSError(number, os.strerror(number))
    return error


def _write_manifest(folder: Path, source_sha256: str) -> None:
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "source_sha256": source_sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _replace_folder(new: Path, target: Path) -> None:
    damaged = target.with_name(target.name + ".damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    if target.exists():
        os.replace(target, damaged)  # a folder can only be renamed onto an empty one
    os.replace(new, target)
    shutil.rmtree(damaged, ignore_errors=True)


def _write_message(folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: no room for the converted model in {folder}; free some space or {_ELSEWHERE}"
    return f"cannot write to the cache folder {folder} ({error.strerror or error}); {_ELSEWHERE}"


_ELSEWHERE = "set LONGSHADOW_CACHE to a folder with room for it"
