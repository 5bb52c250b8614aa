"""The contract of a table: its configuration, columns, targets, and the function that measures its rows."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.record import Check, Row
from bench.session import Session

Unit = Literal["", "s", "B", "B/s", "flop/s", "x", "%", "count", "tok/s"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: the row's key, its heading, and how its number reads. `speedup` marks what a red check hides."""

    key: str
    heading: str
    unit: Unit = ""
    digits: int = 2
    speedup: bool = False


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound on one cell: the first row that holds every pair of `row`, its `column`, at least or at most a value."""

    text: str
    row: Mapping[str, Any]
    column: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"the target {self.text!r} needs exactly one of at_least and at_most")

    def measured(self, rows: Sequence[Row]) -> float | None:
        """The cell's value, or None where no row matches."""
        for row in rows:
            if all(row.get(key) == value for key, value in self.row.items()):
                value = row.get(self.column)
                return None if value is None else float(value)
        return None

    def is_met(self, value: float) -> bool:
        """Whether `value` keeps the bound."""
        if self.at_least is not None:
            return value >= self.at_least
        assert self.at_most is not None
        return value <= self.at_most


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of a table hands back: its rows and its correctness check."""

    rows: Sequence[Row]
    check: Check


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table. `configs` has a full configuration per kind of device ("cpu", "cuda"); `quick` shrinks one.

    `run(config, session)` measures; baselines are rows of the same run.
    """

    name: str
    title: str
    about: str
    configs: Mapping[str, Any]
    quick: Callable[[Any], Any]
    columns: Sequence[Column]
    targets: Sequence[Target]
    run: Callable[[Any, Session], Outcome]


def table_names() -> list[str]:
    """The names of all tables, which are the names of the modules in `bench/tables`."""
    from bench import tables

    return sorted(module.name for module in pkgutil.iter_modules(tables.__path__) if not module.ispkg)


def load_table(name: str) -> Table:
    """The table `name`. Raises ValueError, with the known names, for one that does not exist."""
    names = table_names()
    if name not in names:
        raise ValueError(f"no table is called {name!r}; there are {', '.join(names)}")
    table = importlib.import_module(f"bench.tables.{name}").TABLE
    assert isinstance(table, Table) and table.name == name
    return table
