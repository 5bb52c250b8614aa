"""The blocks of a GPU, run by threads of the CPU: the same as the logic alone, and without data races."""

import subprocess
from pathlib import Path


def test_device_blocks_do_the_same_without_races(device_block_check: Path) -> None:
    done = subprocess.run([device_block_check], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
