"""The test suite's own tools: the check of skipped tests, and poisoned buffers."""

from pathlib import Path

import pytest
import torch

from tests.skip_check import differences, read_skips

TESTS = """
import pytest

def test_runs():
    pass

@pytest.mark.skip(reason="for the test")
@pytest.mark.parametrize("size", [1, 2])
def test_skipped(size):
    pass

@pytest.mark.xfail(strict=True, reason="for the test")
def test_known_failure():
    assert False
"""
CONFTEST = """
from pathlib import Path
from tests.skip_check import SkipCheck

def pytest_configure(config):
    config.pluginmanager.register(SkipCheck(Path("skips.txt")))
"""


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("test_it.py::test_skipped[*]  # both", None),
        ("test_it.py::test_skipped[1]  # one of two", "skipped but not in the list: *test_skipped[[]2[]]"),
        ("test_it.py::*  # all\ntest_it.py::test_gone  # removed", "in the list but not skipped: *test_gone"),
    ],
)
def test_a_session_fails_when_its_skips_differ_from_the_list(
    pytester: pytest.Pytester, listed: str, message: str | None
) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_it=TESTS)
    pytester.makefile(".txt", skips=f"# a comment\n\n{listed}\n")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert result.ret == (pytest.ExitCode.OK if message is None else pytest.ExitCode.TESTS_FAILED)
    result.assert_outcomes(passed=1, skipped=2, xfailed=1)
    if message:
        result.stdout.fnmatch_lines([message])


def test_a_module_that_skips_itself_counts() -> None:
    assert differences(["tests/test_triton.py"], []) == ["skipped but not in the list: tests/test_triton.py"]


def test_only_the_star_is_special_in_a_pattern() -> None:
    assert differences(["a.py::t[x.y]"], ["a.py::t[x.y]"]) == []
    assert len(differences(["a.py::t[x-y]"], ["a.py::t[x.y]"])) == 2


def test_what_runs_on_some_machines_only_may_be_skipped_or_not() -> None:
    assert differences([], ["? a.py::*"]) == []
    assert differences(["a.py::t"], ["? a.py::*"]) == []
    assert differences(["b.py::t"], ["? a.py::*"]) == ["skipped but not in the list: b.py::t"]


def test_a_line_without_a_reason_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "skips.txt"
    path.write_text("tests/test_it.py::test_skipped\n")
    with pytest.raises(ValueError, match="no reason"):
        read_skips(path)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_empty_buffers_are_poisoned(dtype: torch.dtype) -> None:
    like = torch.zeros(3, dtype=dtype)
    poison = torch.iinfo(dtype).max if dtype in (torch.int64, torch.uint8) else float("nan")
    for buffer in (torch.empty(3, dtype=dtype), torch.empty_like(like), like.new_empty(3)):
        if dtype is torch.bool:
            assert buffer.all()
        else:
            assert torch.equal(buffer.isnan(), torch.full((3,), dtype.is_floating_point))
            assert dtype.is_floating_point or (buffer == poison).all()
