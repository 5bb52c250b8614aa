"""Sizes as people write them: of memory in decimal units, of contexts in units of 1,024 tokens."""

import re

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
TOKEN_UNITS = {"": 1, "k": 2**10, "m": 2**20}


def parse_bytes(text: str) -> int:
    """`8GB` -> 8,000,000,000, `512M`, `2 gib`.

    Raises ValueError for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not found or not float(found[1]) > 0:
        raise ValueError(f"a size of memory looks like 8GB or 512MB, got {text!r}")
    unit = 1024 ** list(UNITS).index(found[2]) if found[3] else UNITS[found[2]]
    return int(float(found[1]) * unit)


def parse_tokens(text: str) -> int:
    """`122k` -> 124,928, `1M` -> 1,048,576, `4,000` -> 4,000.

    Raises ValueError for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([km]?)\s*", text.lower().replace(",", ""))
    tokens = int(float(found[1]) * TOKEN_UNITS[found[2]]) if found else 0
    if tokens < 1:
        raise ValueError(f"a context looks like 122k (units of 1,024 tokens) or 124928, got {text!r}")
    return tokens
