"""Compares the tests that were skipped with the committed list: `pytest --check-skips`.

A test that is quietly skipped proves nothing, so every skip stands in a list with its reason. Its lines are
    node id  # reason
where `*` stands for any characters. Empty lines and lines that begin with # say nothing. A line that begins with `? `
is for tests that run on some machines: they may be skipped, but need not be.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

OPTIONAL = "? "


def read_skips(path: Path) -> dict[str, str]:
    """Patterns of node ids and their reasons.

    Raises:
        ValueError: a line has no reason.
    """
    skips = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pattern, _, reason = (part.strip() for part in line.partition("  # "))
        if not reason:
            raise ValueError(f"{path.name}: {line!r} has no reason; write `node id  # reason`")
        skips[pattern] = reason
    return skips


def differences(skipped: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """One line for each skipped node id that no pattern matches, and for each pattern that matches none but should."""
    nodes = sorted(set(skipped))
    expressions = {
        pattern: re.compile(re.escape(pattern.removeprefix(OPTIONAL)).replace(r"\*", ".*")) for pattern in patterns
    }
    lines = [
        f"skipped but not in the list: {node}"
        for node in nodes
        if not any(expression.fullmatch(node) for expression in expressions.values())
    ]
    for pattern, expression in expressions.items():
        if not pattern.startswith(OPTIONAL) and not any(expression.fullmatch(node) for node in nodes):
            lines.append(f"in the list but not skipped: {pattern}")
    return lines


class SkipCheck:
    """A pytest plugin that fails the session when the skipped tests are not those of the list."""

    def __init__(self, path: Path) -> None:
        self._listed = read_skips(path)
        self._skipped: list[str] = []
        self._differences: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # An expected failure reports itself as skipped, too.
        if report.skipped and not hasattr(report, "wasxfail"):
            self._skipped.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._skipped.append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._differences = differences(self._skipped, self._listed)
        if self._differences and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._differences:
            terminalreporter.section("skipped tests differ from the list", red=True)
            for line in self._differences:
                terminalreporter.write_line(line)
