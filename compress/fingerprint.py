"""What tells a model's files from those of another time."""

from longshadow.model_sources import model_files


def model_fingerprint(name: str) -> list[tuple[str, int, int]]:
    """Path, bytes and time of change in ns of every file with weights; of a model on the hub, once it is downloaded."""
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in model_files(name)]
