"""Counts the values of a JSON text without parsing it.

Parsing and checking a body holds up everything else, for about a second per million values, and takes a hundred bytes
and more for each of them; a megabyte in one string costs next to nothing. So the values are counted first.
"""

from longshadow.engine.serving.errors import ApiError

# A batch of 128 prompts of 8,192 token ids.
MOST_VALUES = 2**20
OPENING = (b",", b"[", b"{")


def check_structure(body: bytes, most: int = MOST_VALUES) -> None:
    """Refuses a body with more than `most` JSON values; one that is no JSON may pass, and fails when it is parsed.

    Raises:
        ApiError: there are more.
    """
    if _count(body) <= most:  # what stands in strings included
        return
    # Without escapes every quotation mark begins or ends a string.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    # A string is a value, or the key of one, and there is a value more than commas and brackets.
    if plain.count(b'"') > 4 * (most + 1) or _count(b"".join(plain.split(b'"')[::2])) > most:
        message = f"the request's body holds more than {most:,} JSON values; send several requests, or a text"
        raise ApiError(400, message, code="too_many_values")


def _count(text: bytes) -> int:
    return sum(text.count(mark) for mark in OPENING)
