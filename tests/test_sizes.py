"""Sizes as people write them."""

from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from longshadow.cli import app
from longshadow.engine.runtime.memory import MemoryBudget
from longshadow.sizes import parse_bytes, parse_share_or_bytes, parse_tokens

SIZES = {
    "8GB": 8 * 10**9,
    "8 g": 8 * 10**9,
    "8GiB": 8 * 2**30,
    "8gi": 8 * 2**30,
    "1.5MiB": 3 * 2**19,
    "2kb": 2000,
    "1T": 10**12,
    "12": 12,
    "7b": 7,
    9: 9,
    np.int64(9): 9,
}
NO_SIZES = ["", "GB", "8 parsecs", "-1GB", "0", "0.0001", "inf", "nan", "1e9", "9" * 400 + "T", "8G8", "٨G", "8iB"]
NO_NUMBERS = [0, -5, True, 1.5, float("inf"), float("nan"), None, b"8G", [8], 2**80]


@pytest.mark.parametrize(("text", "expected"), SIZES.items())
def test_a_size_is_one_number_wherever_it_is_given(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected
    assert parse_share_or_bytes(text, 5, "size") == expected
    for place in ("device", "host"):
        limits: dict[str, Any] = {"device_memory": "1%", "host_memory": "1%", f"{place}_memory": text}
        assert getattr(MemoryBudget.of(torch.device("cpu"), **limits), f"{place}_limit") == expected


@pytest.mark.parametrize("text", [*NO_SIZES, *NO_NUMBERS])
def test_no_sizes(text: Any) -> None:
    with pytest.raises(ValueError, match="the size must look like 8GB"):
        parse_bytes(text, "the size")
    with pytest.raises(ValueError, match="the size must be bytes"):
        parse_share_or_bytes(text, 1000, "the size")


def test_shares() -> None:
    assert parse_share_or_bytes("50%", 1000, "size") == 500 and parse_share_or_bytes("0.5 %", 1000, "size") == 5
    for text in ("0%", "101%", "-1%", "8G%", "%", "inf%"):
        with pytest.raises(ValueError, match="size must be bytes"):
            parse_share_or_bytes(text, 1000, "size")


def test_tokens() -> None:
    assert parse_tokens("122k") == parse_tokens(" 122 K") == 124_928 == parse_tokens("124,928")
    assert parse_tokens("1M") == 2**20 and parse_tokens("0.5k") == 512 and parse_tokens("7") == 7
    for text in ("", "k", "-1k", "0", "0.0001k", "12kb", "many", "9" * 400, "inf"):
        with pytest.raises(ValueError, match="looks like 122k"):
            parse_tokens(text)


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "--model", "llama-3.1-8b", "--gpu", "h200", "--context", "8k", "--host-memory", "8X"],
        ["compensate", "demo", "--quantized", "q", "--output", "out", "--max-memory", "8X"],
        ["adapter", "inspect", "q", "--original", "demo", "--max-memory", "8X"],
    ],
)
def test_commands_refuse_other_sizes_and_name_the_option(command: list[str]) -> None:
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and f"error: {command[-2]} must look like 8GB" in result.stderr
    assert "8 x 2^30" in result.stderr
