"""What `generate` and `serve` let a user choose about the compressed cache. Nothing heavy is imported up here."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from longshadow import ShadowKVConfig

AUTO_RANK_ENERGY = 0.95


class KeyDType(StrEnum):
    """Number formats of compressed keys."""

    int8 = "int8"
    fp8 = "fp8"


class ValueDType(StrEnum):
    """Number formats of stored values."""

    int8 = "int8"


Budget = Annotated[
    str | None,
    typer.Option(
        help="Tokens selected per step and KV head: a share of the context such as 1.56%, or a number. "
        "Default: the larger of 1.56% and 512. A budget that covers the context runs dense."
    ),
]
Rank = Annotated[
    str | None,
    typer.Option(
        help="Rank of the key cache, or `auto` for the rank that keeps "
        f"{AUTO_RANK_ENERGY:.0%} of the keys' energy. Default: 160 or a third of the keys' width."
    ),
]
KeyFormat = Annotated[
    KeyDType | None, typer.Option("--key-dtype", help="Of the low-rank keys and landmarks. Default: the model's.")
]
ValueFormat = Annotated[
    ValueDType | None, typer.Option("--value-dtype", help="Of the values in host memory. Default: the model's.")
]


def shadowkv_config(
    budget: str | None, rank: str | None, key_dtype: KeyDType | None, value_dtype: ValueDType | None
) -> "ShadowKVConfig":
    """The cache that the options ask for. Raises ValueError naming the option that is wrong."""
    budget_tokens, budget_fraction = parse_budget(budget)
    fixed_rank = parse_rank(rank)

    from longshadow import ShadowKVConfig

    return ShadowKVConfig(
        budget_tokens=budget_tokens,
        budget_fraction=budget_fraction,
        rank=fixed_rank,
        rank_energy=AUTO_RANK_ENERGY if rank == "auto" else None,
        factor_dtype=None if key_dtype is None else key_dtype.value,
        value_dtype=None if value_dtype is None else "int8",
    )


def parse_budget(text: str | None) -> tuple[int | None, float | None]:
    """`512` -> (512, None), `1.56%` -> (None, 0.0156), nothing -> (None, None).

    Raises:
        ValueError: it is neither, or out of range.
    """
    if text is None:
        return None, None
    message = (
        "--budget takes a share of the context such as 1.56% (above 0%, at most 100%) "
        f"or a number of tokens (1 or more), got {text!r}"
    )
    try:
        if text.endswith("%"):
            share = float(text.removesuffix("%")) / 100
            if 0 < share <= 1:
                return None, share
        elif int(text) >= 1:
            return int(text), None
    except ValueError as error:
        raise ValueError(message) from error
    raise ValueError(message)


def parse_rank(text: str | None) -> int | None:
    """A number from 1, or None for `auto` and nothing.

    Raises:
        ValueError: it is neither.
    """
    if text is None or text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--rank takes a number (1 or more) or auto, got {text!r}")
    return int(text)


def check_model(name: str, shadowkv: "ShadowKVConfig", max_model_len: int | None = None) -> None:
    """Raises ValueError, before any weight is read, for a model that ShadowKV does not support, a rank above the width
    of its keys, and sequences longer than its own.
    """
    from longshadow.engine.runtime.loading import check_before_loading
    from longshadow.generation import key_width

    model_config = check_before_loading(name, max_model_len)
    if shadowkv.rank is not None and shadowkv.rank > (width := key_width(model_config)):
        raise ValueError(
            f"--rank must be between 1 and {width} (KV heads x head_dim) for this model, got {shadowkv.rank}"
        )
