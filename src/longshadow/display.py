"""A run as the terminal sees it: progress on stderr, the answer on stdout as it comes."""

from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from longshadow.generation import Generation, Sampling, generate, warm_up
from longshadow.models import LoadedModel
from longshadow.prompts import room_for_new_tokens
from longshadow.report import Report

if TYPE_CHECKING:
    import torch

    from longshadow import ShadowKVConfig


def answer(
    loaded: LoadedModel,
    prompt_ids: "torch.Tensor",
    sampling: Sampling,
    shadow: "ShadowKVConfig",
    *,
    compare: bool,
    stream: bool,
) -> Report:
    """Generates with a ShadowKV cache, and once more with a full cache to compare; reports both.

    Args:
        prompt_ids: [1, n].
        compare: run full attention too.
        stream: print the answers to stdout as they come.

    Raises:
        ValueError: the prompt is longer than the model's positions.
    """
    prompt_tokens = prompt_ids.shape[1]
    room = room_for_new_tokens(prompt_tokens, loaded.max_positions, sampling.max_new_tokens)
    if room < sampling.max_new_tokens:
        _note(f"the model's {loaded.max_positions:,} positions leave room for {room:,} new tokens")
    sampling = replace(sampling, max_new_tokens=room)
    warm_up(loaded.model)
    ours = _run(loaded, prompt_ids, sampling, shadow, "ShadowKV" if compare else None, stream)
    theirs = None
    if compare and not ours.interrupted:
        theirs = _run(loaded, prompt_ids, sampling, None, "full attention", stream)
    return Report(
        model=loaded.name,
        device=str(loaded.model.device),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        prompt_tokens=prompt_tokens,
        shadowkv=ours,
        full_attention=theirs,
    )


def print_report(report: Report) -> None:
    """The table, on stdout."""
    from rich.console import Console

    Console().print(report.to_table())


def _run(
    loaded: LoadedModel,
    prompt_ids: "torch.Tensor",
    sampling: Sampling,
    shadow: "ShadowKVConfig | None",
    heading: str | None,
    stream: bool,
) -> Generation:
    if stream and heading:
        print(f"{heading}:", flush=True)
    with LayerBar(f"reading {prompt_ids.shape[1]:,} tokens") as bar:

        def on_text(text: str) -> None:
            bar.stop()  # the bar and the answer may share a terminal
            if stream:
                print(text, end="", flush=True)

        generation = generate(loaded, prompt_ids, sampling, shadow=shadow, on_text=on_text, on_prefill=bar.update)
    if stream:
        print("\n", flush=True)
    return generation


class LayerBar:
    """A progress bar over a model's layers, or other steps, on stderr, gone when the work is done."""

    def __init__(self, description: str, step: str = "layer") -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[step]}"),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._description = description
        self._task = self._progress.add_task(description, total=None, step=step)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def update(self, num_done: int, num_steps: int, description: str | None = None, step: str = "layer") -> None:
        """Shows how many steps are done, and of what work; the time left is that of this work alone."""
        if description is not None and description != self._description:
            self._progress.reset(self._task, total=num_steps, description=description, step=step)
            self._description = description
        self._progress.update(self._task, completed=num_done, total=num_steps)

    def stop(self) -> None:
        """Takes the bar away; harmless when it is gone already."""
        self._progress.stop()


def _note(message: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(f"note: {message}")
