"""LoRA DPO (arXiv 2305.18290) over shared prompts: TRL's trainer, checkpoints, and an adapter at the end.

    python examples/dpo_prefix_sharing.py --data examples/preferences.jsonl --output-dir runs/dpo --epochs 2

Each line of the data is one pair, {"prompt": ..., "chosen": ..., "rejected": ...}: three texts, or three lists of
{"role": ..., "content": ...}. Ctrl-C saves a checkpoint, and --resume continues from it. Needs the extra `train`.
"""

import json
import math
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from longshadow.models import load_model

COLUMNS = ("prompt", "chosen", "rejected")
USER_ERROR, INTERRUPTED = 2, 130
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="JSONL file of preference pairs: prompt, chosen, rejected.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for checkpoints and the adapter.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, or `demo` (SmolLM2-135M-Instruct).")] = "demo",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; instead of --epochs.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data. Default: 1.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs in a batch.")] = 2,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Batches in a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(min=0, help="At the first step; falls to 0 at the last.")] = 1e-4,
    beta: Annotated[float, typer.Option(min=0, help="How closely to stay with the reference.")] = 0.1,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer; the rest is cut.")] = 1024,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    lora_dropout: Annotated[float, typer.Option(min=0, max=0.99, help="A shared token is dropped once.")] = 0.0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints; the last two are kept.")] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
) -> None:
    """Train a LoRA adapter on preference pairs; a pair's prompt is computed once."""
    with one_line_errors():
        if steps and epochs:
            raise ValueError("give --steps or --epochs, not both")
        pairs = read_pairs(data)
        check_writable(output_dir)
        checkpoint = checkpoint_to_resume(output_dir, resume)
        options = dict(
            output_dir=str(output_dir),
            num_train_epochs=epochs or 1,
            max_steps=steps or -1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation,
            learning_rate=learning_rate,
            beta=beta,
            max_length=max_length,
            disable_dropout=lora_dropout == 0,  # TRL would switch LoRA's off, too
            save_steps=save_steps,
        )
        trainer = make_trainer(model, pairs, options, r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=lora_dropout)
        total = trainer.args.max_steps
        done = 0 if checkpoint is None else steps_done(checkpoint, trainer)
    if done >= total:
        print(f"nothing to do: {done} of {total} steps are done, adapter in {checkpoint}")
        return
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt:
        leave("stopped at once; add --resume to continue from the newest checkpoint")
    if (step := trainer.state.global_step) < total:
        leave(f"interrupted after step {step} of {total}; add --resume to continue from {output_dir}/checkpoint-{step}")
    trainer.save_model()
    print(summary(trainer, output_dir))


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """The pairs of a JSONL file; ValueError tells which line is none, and why."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; --data takes a JSONL file of preference pairs")
    pairs: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            pairs.append(parse_pair(line, f"{path} line {number}"))
            if len({type(text) for pair in (pairs[0], pairs[-1]) for text in pair.values()}) > 1:
                raise ValueError(f"{path} line {number} mixes texts and messages; use one form in all lines")
    if not pairs:
        raise ValueError(f"{path} is empty; write one JSON object with {', '.join(COLUMNS)} per line")
    return pairs


def parse_pair(line: str, place: str) -> dict[str, Any]:
    """One line's columns; others are left out."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error.msg}, column {error.colno}); correct it") from error
    missing = [name for name in COLUMNS if not isinstance(row, dict) or name not in row]
    if missing:
        raise ValueError(f"{place} has no {', '.join(missing)}; each line needs {', '.join(COLUMNS)}")
    for name in COLUMNS:
        if not row[name] or not (isinstance(row[name], str) or is_messages(row[name])):
            raise ValueError(f'{place}: {name} must be a text or a list of {{"role": ..., "content": ...}}, not empty')
    return {name: row[name] for name in COLUMNS}


def is_messages(value: Any) -> bool:
    """Whether it is a list of {"role": ..., "content": text}."""
    return isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    )


def check_writable(folder: Path) -> None:
    """Makes the folder; ValueError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); choose another --output-dir") from error


def checkpoint_to_resume(folder: Path, resume: bool) -> Path | None:
    """The newest checkpoint for --resume, None without it; ValueError where that is not what the folder holds."""
    checkpoint = newest_checkpoint(folder)
    if resume and checkpoint is None:
        raise ValueError(f"{folder} holds no checkpoint; leave --resume out to start from the beginning")
    if checkpoint is not None and not resume:
        raise ValueError(f"{folder} holds checkpoints; --resume continues them, or choose another --output-dir")
    return checkpoint


def newest_checkpoint(folder: Path) -> Path | None:
    """Of those with a state file, which is written last: a checkpoint cut short does not count."""
    complete = [state.parent for state in folder.glob("checkpoint-[0-9]*/trainer_state.json")]
    return max(complete, key=lambda checkpoint: int(checkpoint.name.split("-")[1]), default=None)


def steps_done(checkpoint: Path, trainer: Any) -> int:
    """Steps that a checkpoint holds; ValueError when its adapter is another one than the trainer's."""
    saved = json.loads((checkpoint / "adapter_config.json").read_text())
    base, rank = saved["base_model_name_or_path"], saved["r"]
    adapter = trainer.model.peft_config["default"]
    if rank != adapter.r or Path(base).name != Path(adapter.base_model_name_or_path).name:
        raise ValueError(f"{checkpoint} adapts {base} with rank {rank}; resume with the same --model and --lora-rank")
    return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])


def make_trainer(name: str, pairs: list[dict[str, Any]], options: dict[str, Any], **lora: Any) -> Any:
    """A `PrefixSharingDPOTrainer` of a fresh adapter, its number of steps settled."""
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from trl import DPOConfig

    from longshadow import PrefixSharingDPOTrainer

    disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)  # for what TRL calls by its older name
    options |= dict(save_total_limit=2, logging_steps=1, report_to=[])
    gpu = torch.cuda.is_available()
    loaded = load_model(name)
    trainer = PrefixSharingDPOTrainer(
        model=loaded.model,
        args=DPOConfig(use_cpu=not gpu, bf16=gpu, gradient_checkpointing=gpu, **options),
        train_dataset=Dataset.from_list(pairs),
        processing_class=loaded.tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora),
    )
    args, kept = trainer.args, len(trainer.train_dataset)
    if kept < len(pairs):
        typer.echo(f"{len(pairs) - kept} of {len(pairs)} pairs are left out: their prompts fill --max-length", err=True)
    if kept == 0:
        raise ValueError("no pair is left; raise --max-length")
    batches = math.ceil(kept / args.per_device_train_batch_size)
    if args.max_steps < 0:
        args.max_steps = math.ceil(batches / args.gradient_accumulation_steps) * int(args.num_train_epochs)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossInBar())
    trainer.add_callback(SaveOnInterrupt())
    return trainer


class LossInBar(ProgressCallback):
    """The Trainer's progress bar on stderr, with the loss beside it instead of all metrics on stdout."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        # the bar of a resumed run begins where that run does
        self.current_step = self.training_bar.initial = self.training_bar.n = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}")


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C ends training with a checkpoint when the step is done; a second one ends it at once."""

    interrupted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.previous = signal.signal(signal.SIGINT, self.on_interrupt)

    def on_interrupt(self, number: int, frame: Any) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # not by `print`, which may be what was interrupted
        os.write(2, b"\nfinishing this step to save a checkpoint; Ctrl-C again stops at once\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted:  # only here do weights, optimizer and counters belong to the same step
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGINT, self.previous)


def summary(trainer: Any, folder: Path) -> str:
    """What was trained and what sharing saved, in one line."""
    report = trainer.policy_sharing
    loss = next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)
    ratio = report.token_ratio
    trained = f"{trainer.state.global_step} steps, final loss {loss:.4f}"
    return f"{trained}, token ratio {ratio:.2f} (padded / computed), adapter in {folder}"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """An error of the user's becomes one line and exit code 2."""
    try:
        yield
    except ImportError as error:
        leave(f"error: this needs TRL and PEFT: pip install 'longshadow[train]' ({error})", USER_ERROR)
    except (ValueError, OSError) as error:
        leave(f"error: {error}", USER_ERROR)
    except KeyboardInterrupt:
        leave("interrupted before the first step")


def leave(message: str, code: int = INTERRUPTED) -> NoReturn:
    """One line on stderr."""
    typer.echo(" ".join(message.split()), err=True)
    raise typer.Exit(code) from None


if __name__ == "__main__":
    app()
