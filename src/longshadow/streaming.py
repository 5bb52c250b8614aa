"""A generation as it happens: layers of the prefill, then text and the times of its tokens, and Ctrl-C."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

TextCallback = Callable[[str], None]
PrefillCallback = Callable[[int, int], None]


class MeasuringStreamer(BaseStreamer):
    """Hands on text as soon as its characters are complete, and keeps the tokens and when they came."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: TextCallback,
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_interrupted`: asked at every token; once it is true, the next token raises KeyboardInterrupt."""
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._is_interrupted = is_interrupted
        self._started = time.perf_counter()
        self._times: list[float] = []
        self._saw_prompt = False
        # Decoding restarts one piece back: some tokenizers drop a leading space.
        self._context_start = self._told = 0

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then each new token [1]."""
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self.tokens.extend(value.flatten().tolist())
        self._times.append(time.perf_counter())
        text = self._untold_text()
        if text and not text.endswith("\ufffd"):  # else a character whose last bytes are to come
            self._tell(text)
        if self._is_interrupted():
            raise KeyboardInterrupt

    def end(self) -> None:
        """Hands on what is still held back."""
        if text := self._untold_text():
            self._tell(text)

    def _untold_text(self) -> str:
        context = self._decode(self.tokens[self._context_start : self._told])
        return self._decode(self.tokens[self._context_start :])[len(context) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        self._context_start, self._told = self._told, len(self.tokens)
        self.pieces.append(text)
        self._on_text(text)

    @property
    def first_token_seconds(self) -> float | None:
        """From the making of this object to the first token; None when there is no token."""
        return self._times[0] - self._started if self._times else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None when there is none."""
        return (len(self._times) - 1) / (self._times[-1] - self._times[0]) if len(self._times) > 1 else None


@contextmanager
def remembered_interrupts() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C came, also where its KeyboardInterrupt got lost.

    Python drops an exception that is raised in a destructor, a weak reference's callback, or a callback from C,
    and a signal may arrive just there. Only the main thread sees signals; a handler that is not Python's own
    is left alone.
    """
    pressed = threading.Event()

    def remember(number: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.default_int_handler(number, frame)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed.is_set
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def prefill_hooks(model: PreTrainedModel, on_prefill: PrefillCallback) -> Iterator[None]:
    """Reports every decoder layer of the model's first pass."""
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    layers = next(
        (module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers),
        torch.nn.ModuleList(),
    )
    num_done = 0

    def report(*_: object) -> None:
        nonlocal num_done
        num_done += 1
        if num_done <= num_layers:
            on_prefill(num_done, num_layers)

    handles = [layer.register_forward_hook(report) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
