"""Limits of an engine, as its user gives them: checked before a model is loaded."""

from longshadow.engine.runtime.sampling_params import check_integer
from longshadow.sizes import parse_share_or_bytes

# A prompt's chunks end at multiples of this many tokens, but for the last.
CHUNK_MULTIPLE = 64


def check_limits(
    *,
    max_num_seqs: int,
    max_model_len: int | None,
    max_num_waiting: int,
    device_memory: str | int,
    host_memory: str | int | None,
    max_prefill_tokens: int = CHUNK_MULTIPLE,
) -> None:
    """Raises ValueError, which begins with the limit's name, for one that no engine can have."""
    check_integer("max_num_seqs", max_num_seqs, 1)
    check_integer("max_prefill_tokens", max_prefill_tokens, CHUNK_MULTIPLE)
    check_integer("max_num_waiting", max_num_waiting, 1)
    if max_model_len is not None:
        check_integer("max_model_len", max_model_len, 2)
    parse_share_or_bytes(device_memory, 0, "device_memory")
    if host_memory is not None:
        parse_share_or_bytes(host_memory, 0, "host_memory")
