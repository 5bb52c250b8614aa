"""Benchmarks of lm-eval, on a task of our own whose answers are known."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from longshadow.cli import app
from longshadow.compress.adapters.files import save_adapter
from tests.compress.adapters.lora_files import factors_for, with_products
from tests.compress.test_pipeline import round_to_nearest
from tests.tiny_models import tiny_model, tiny_tokenizer, write_folder

pytest.importorskip("lm_eval", reason="lm-eval brings 39 packages and 200 MB; make test-formats")
pytestmark = pytest.mark.slow

NUM_QUESTIONS = 24
FACTORS = factors_for(tiny_model(), ranks=(8,))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an index of 15,000 tasks, and without asking pip what is installed."""
    import lm_eval.evaluator
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With original, quantized, and an adapter that gives the quantised model random new weights."""
    parent = tmp_path_factory.mktemp("models")
    write_folder(parent / "original")
    quantized = round_to_nearest(tiny_model())
    quantized.save_pretrained(parent / "quantized")
    tiny_tokenizer().save_pretrained(parent / "quantized")

    save_adapter(parent / "adapter", FACTORS, base_model=str(parent / "quantized"))
    return parent


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose right answer is what the original finds likelier, a YAML file beside its data."""
    parent = tmp_path_factory.mktemp("task")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    rows = []
    for number in range(NUM_QUESTIONS):
        question, choices = f"question {number}:", [" yes", " no!"]
        rows.append({"question": question, "choices": choices, "answer": likelier(model, tokenizer, question, choices)})
    (parent / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = {
        "task": "what_the_original_says",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(parent / "data.jsonl")}, "cache_dir": str(parent / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path = parent / "task.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


@torch.no_grad()
def likelier(model: Any, tokenizer: Any, question: str, choices: list[str]) -> int:
    scores = []
    for choice in choices:
        ids = torch.tensor(tokenizer(question + choice)["input_ids"])
        length = len(tokenizer(choice)["input_ids"])
        found = model(ids[None]).logits[0, :-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        scores.append(float(found[-length:].sum()))
    return int(scores[1] > scores[0])


def evaluate(folder: Path, tasks: str, *options: str) -> Result:
    command = [
        "adapter",
        "evaluate",
        str(folder / "adapter"),
        "--original",
        str(folder / "original"),
        "--device",
        "cpu",
    ]
    sizes = ["--quantized", str(folder / "quantized"), "--sequence-length", "64", "--num-samples", "3"]
    return CliRunner().invoke(app, [*command, *sizes, "--tasks", tasks, *options])


def test_scores_of_all_models(folder: Path, task: Path) -> None:

    result = evaluate(folder, str(task), "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)["tasks"]
    assert told["limit"] is None
    scores = told["results"]["what_the_original_says"]["acc"]
    adapted = with_products(round_to_nearest(tiny_model()), (FACTORS, dict.fromkeys(FACTORS, 1.0)))
    expected = {"original": 1.0, "quantised": answered(round_to_nearest(tiny_model()), task)}
    expected["with the adapter"] = answered(adapted, task)
    assert {name: score["value"] for name, score in scores.items()} == pytest.approx(expected)
    assert expected["with the adapter"] < 1 and scores["with the adapter"]["stderr"] > 0


def answered(model: Any, task: Path) -> float:
    """The share of questions that a model answers like the original."""
    rows = [json.loads(line) for line in (task.parent / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    right = [likelier(model, tiny_tokenizer(), row["question"], row["choices"]) == row["answer"] for row in rows]
    return sum(right) / len(right)


def test_the_table_and_a_limit(folder: Path, task: Path) -> None:

    result = evaluate(folder, str(task), "--tasks-limit", "5")
    assert result.exit_code == 0, result.stderr
    assert "at most 5 examples of each" in result.stdout and "1.0000 ± 0.0000" in result.stdout


def test_unknown_tasks(folder: Path) -> None:

    assert "lm-eval has no task no_such_task_at_all" in error_of(evaluate(folder, "no_such_task_at_all"))


def test_data_that_cannot_be_had(folder: Path, task: Path, tmp_path: Path) -> None:

    config = json.loads(task.read_text(encoding="utf-8"))
    config["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "nowhere.jsonl")
    (tmp_path / "broken.yaml").write_text(json.dumps(config), encoding="utf-8")
    error = error_of(evaluate(folder, str(tmp_path / "broken.yaml")))
    assert "lm-eval cannot run" in error and "nowhere.jsonl" in error


def error_of(result: Result) -> str:
    """The one line on stderr of a mistake."""
    assert result.exit_code == 2 and result.stdout == ""
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line
