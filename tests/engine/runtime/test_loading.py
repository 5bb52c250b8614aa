"""Models that cannot work are refused by their configuration: their folders here hold nothing else."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from longshadow import LLM
from longshadow.cli import app

SIZES: dict[str, Any] = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
REFUSED = {
    "bloom": "no attention module",
    "gpt2": "no attention module",
    "jamba": "layers of type 'linear_attention'",
    "minicpm3": "latent vectors",
}


def folder_of(kind: str, path: Path, **changes: Any) -> str:
    AutoConfig.for_model(kind, **SIZES, **changes).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", REFUSED)
def test_unsupported_models_are_not_loaded(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path)
    with pytest.raises(ValueError, match=f"ShadowKV does not support .*{REFUSED[kind]}") as refused:
        LLM(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("command", ["generate", "batch", "serve"])
def test_commands_refuse_them_too(command: str, tmp_path: Path) -> None:
    folder, text, lines = folder_of("gpt2", tmp_path), tmp_path / "text.txt", tmp_path / "lines.jsonl"
    text.write_text("A text.")
    lines.write_text('{"prompt": "A text."}\n')
    arguments = {
        "generate": ["generate", "--model", folder, "--prompt-file", text],
        "batch": ["generate", "--model", folder, "--input", lines, "--output", tmp_path / "answers.jsonl"],
        "serve": ["serve", folder, "--port", 0],
    }[command]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "ShadowKV does not support" in line and "no attention module" in line


def test_a_length_beyond_the_models_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path, max_position_embeddings=512)
    with pytest.raises(ValueError, match="max_model_len must be at most 512"):
        LLM(folder, max_model_len=513)
