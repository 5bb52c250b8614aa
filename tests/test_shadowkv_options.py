"""Options of the compressed cache, which commands share."""

import inspect

import pytest

from longshadow.cli import generate
from longshadow.serve_cli import serve
from longshadow.shadowkv_options import KeyDType, ValueDType, parse_budget, parse_rank, shadowkv_config


def test_budget_and_rank() -> None:
    assert parse_budget(None) == (None, None)
    assert parse_budget("512") == (512, None)
    assert parse_budget("1.56%") == (None, pytest.approx(0.0156))
    assert parse_budget("100%") == (None, 1.0)
    assert parse_rank(None) is parse_rank("auto") is None
    assert parse_rank("64") == 64


def test_options_make_the_configuration() -> None:
    config = shadowkv_config("10%", "auto", KeyDType.fp8, ValueDType.int8)
    assert (config.budget_fraction, config.rank, config.rank_energy) == (0.1, None, 0.95)
    assert (config.factor_dtype, config.value_dtype) == ("fp8", "int8")
    plain = shadowkv_config(None, "32", None, None)
    assert (plain.budget_tokens, plain.rank, plain.factor_dtype, plain.value_dtype) == (None, 32, None, None)


def test_commands_offer_the_same() -> None:
    for name in inspect.signature(shadowkv_config).parameters:
        assert inspect.signature(serve).parameters[name] == inspect.signature(generate).parameters[name]
