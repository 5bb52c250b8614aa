"""An engine that the tests of a file share; leave it open."""

from collections.abc import Iterator

import pytest

from longshadow import LLM
from tests.engine.runtime.engines import engine


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with engine() as opened:
        yield opened
