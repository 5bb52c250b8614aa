"""Sizes as people write them: of memory in decimal units, or binary ones with an i; of contexts in units of 1,024."""

import operator
import re

# 8G and 8GB are 8,000,000,000 bytes, as disks and data sheets count; 8GiB are 8 x 1,024^3.
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
TOKEN_UNITS = {"": 1, "k": 2**10, "m": 2**20}
MOST_BYTES = 2**63 - 1
UNITS_HELP = "8G or 8GB is 8 x 10^9 bytes, 8GiB 8 x 2^30"


def parse_bytes(value: str | int, name: str = "a size of memory") -> int:
    """`8GB` -> 8,000,000,000, `512M`, `2 gib` -> 2,147,483,648, 4096 -> 4,096.

    Raises ValueError, which begins with `name`, for anything else.
    """
    found = _number(value, r"([kmgt]i|[kmgt]?)b?")
    if found is not None:
        amount, unit = found
        num_bytes = amount * (BINARY_UNITS[unit[0]] if unit.endswith("i") else UNITS[unit])
        if 1 <= num_bytes <= MOST_BYTES:
            return int(num_bytes)
    raise ValueError(f"{name} must look like 8GB or 512MiB ({UNITS_HELP}), got {value!r}")


def parse_share_or_bytes(value: str | int, whole: int, name: str) -> int:
    """The same, or a share of `whole` bytes: `90%`."""
    found = _number(value, "(%)") if isinstance(value, str) else None
    if found is not None and 0 < found[0] <= 100:
        return int(found[0] / 100 * whole)
    if found is None:
        try:
            return parse_bytes(value)
        except ValueError:
            pass
    raise ValueError(
        f"{name} must be bytes, a size such as 8GB or 8GiB ({UNITS_HELP}), or a share such as 90% (above 0, at most "
        f"100%), got {value!r}"
    )


def parse_tokens(text: str) -> int:
    """`122k` -> 124,928, `1M` -> 1,048,576, `4,000` -> 4,000.

    Raises ValueError for anything else.
    """
    found = _number(text.replace(",", ""), "([km]?)")
    tokens = found[0] * TOKEN_UNITS[found[1]] if found else 0
    if not 1 <= tokens <= MOST_BYTES:
        raise ValueError(f"a context looks like 122k (units of 1,024 tokens) or 124928, got {text!r}")
    return int(tokens)


def _number(value: object, unit: str) -> tuple[float, str] | None:
    """A number and its unit in small letters; None where they are not that."""
    if not isinstance(value, str):
        is_integer = hasattr(value, "__index__") and not isinstance(value, bool) and not getattr(value, "shape", ())
        return (operator.index(value), "") if is_integer else None  # type: ignore[arg-type]
    found = re.fullmatch(rf"\s*(\d{{1,20}}(?:\.\d{{1,20}})?)\s*{unit}\s*", value.lower(), re.ASCII)
    if found is None:
        return None
    return (float(found[1]) if "." in found[1] else int(found[1])), found[2]
