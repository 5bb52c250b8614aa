"""Sizes as people write them."""

import pytest

from longshadow.sizes import parse_bytes, parse_tokens


def test_bytes() -> None:
    assert parse_bytes("8GB") == parse_bytes("8 g") == 8 * 10**9
    assert parse_bytes("1.5MiB") == 3 * 2**19 and parse_bytes("12") == 12
    for text in ("", "GB", "8 parsecs", "-1GB", "0"):
        with pytest.raises(ValueError, match="looks like 8GB"):
            parse_bytes(text)


def test_tokens() -> None:
    assert parse_tokens("122k") == parse_tokens(" 122 K") == 124_928 == parse_tokens("124,928")
    assert parse_tokens("1M") == 2**20 and parse_tokens("0.5k") == 512 and parse_tokens("7") == 7
    for text in ("", "k", "-1k", "0", "0.0001k", "12kb", "many"):
        with pytest.raises(ValueError, match="looks like 122k"):
            parse_tokens(text)
