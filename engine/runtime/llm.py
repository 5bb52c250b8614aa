"""`LLM`: a model that answers many requests at once, over long contexts that take little memory."""

import functools
import weakref
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Sequence_
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longshadow.engine.runtime.accounting import Accounting
from longshadow.engine.runtime.asking import answer_all, follow
from longshadow.engine.runtime.chat import encode_chat, encode_document
from longshadow.engine.runtime.documents import Document
from longshadow.engine.runtime.engine import Engine
from longshadow.engine.runtime.intake import Intake, Prompt, as_params, as_prompts, check_document
from longshadow.engine.runtime.library import Library
from longshadow.engine.runtime.limits import check_limits
from longshadow.engine.runtime.loading import check_before_loading, end_tokens, load, model_len
from longshadow.engine.runtime.memory import Bytes, MemoryBudget
from longshadow.engine.runtime.model_defaults import ModelDefaults
from longshadow.engine.runtime.outputs import EngineStatistics, RequestOutput
from longshadow.engine.runtime.prefixes import PrefixCache
from longshadow.engine.runtime.runner import ModelRunner
from longshadow.engine.runtime.sampling_params import SamplingParams
from longshadow.engine.runtime.workspace import step_workspace
from longshadow.engine.shadowkv import ShadowKVConfig

# Of each place's memory, for heads of earlier prompts.
PREFIX_CACHE_SHARE = 4


class LLM:
    """A model and everything that is asked of it. Requests may come from any thread; one thread computes.

    Args:
        model: a Hugging Face hub id, a folder, a `.gguf` file, `demo`, or a model, which then belongs to the engine
            until `close`.
        tokenizer: of a model given as an object; without one, prompts are token ids and answers have no text.
        shadowkv: configuration of the compressed cache.
        adapter: folder of a LoRA adapter to add.
        max_num_seqs: sequences that decode together.
        max_model_len: tokens of document, prompt and answer together. Default: what the model was made for.
        max_prefill_tokens: prompt tokens that a step reads beside decoding, at least 64.
        max_num_waiting: requests that may wait; more raise QueueFull.
        device_memory: for sequences, documents and their workspace, the weights apart: bytes, a size such as "8G"
            (8 x 10^9 bytes) or "8GiB" (8 x 2^30), or a share of what is free when the engine is made. On a CPU this is
            main memory, host_memory's included.
        host_memory: for what the cache keeps in main memory. Default: 90% of what is free; on a CPU device_memory.
        prefix_cache: keep prompts' tokens for later prompts that begin alike; does not change answers.

    Raises ValueError for a model that ShadowKV does not support and for arguments out of range.

    Example:
        with LLM("demo") as llm:
            document = llm.add_document(text)
            [output] = llm.generate(question, SamplingParams(max_tokens=64), document=document)
            print(output.outputs[0].text)
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        shadowkv: ShadowKVConfig | None = None,
        adapter: str | Path | None = None,
        max_num_seqs: int = 8,
        max_model_len: int | None = None,
        max_prefill_tokens: int = 512,
        max_num_waiting: int = 256,
        device_memory: str | int = "90%",
        host_memory: str | int | None = None,
        prefix_cache: bool = True,
    ) -> None:
        check_limits(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_prefill_tokens=max_prefill_tokens,
            max_num_waiting=max_num_waiting,
            device_memory=device_memory,
            host_memory=host_memory,
        )
        if not isinstance(shadowkv, ShadowKVConfig | None):
            raise ValueError(f"shadowkv must be a ShadowKVConfig, got a {type(shadowkv).__name__}")
        if isinstance(model, str | Path):
            check_before_loading(str(model), max_model_len)
        self.model, self.tokenizer = load(model, tokenizer, adapter)
        self.max_model_len = model_len(self.model.config, max_model_len)
        self.max_num_seqs = max_num_seqs
        defaults = ModelDefaults.of(self.model, end_tokens(self.model, self.tokenizer))
        defaults.warn()
        config = shadowkv or ShadowKVConfig()
        self._runner = ModelRunner(self.model, config, self.max_model_len)
        try:
            self._accounting = Accounting(
                self._runner.shapes, config, self._runner.device, is_batched=self._runner.batched is not None
            )
            budget = MemoryBudget.of(self._runner.device, device_memory, host_memory)
            limits = budget.limits
            share = Bytes(device=limits.device // PREFIX_CACHE_SHARE, host=limits.host // PREFIX_CACHE_SHARE)
            batched = self._runner.batched
            workspace = step_workspace(
                self.model,
                max_prefill_tokens,
                max_num_seqs,
                self.max_model_len,
                captures=batched is not None and batched.captures,
            )
            self._engine = Engine(
                self._runner,
                self._accounting,
                budget,
                fixed=Bytes(device=self._runner.rotation_bytes + workspace),
                prefixes=PrefixCache(share, self._accounting.sizes.stored) if prefix_cache else None,
                max_num_seqs=max_num_seqs,
                max_prefill_tokens=max_prefill_tokens,
                max_num_waiting=max_num_waiting,
            )
            self._intake = Intake(
                tokenizer=self.tokenizer,
                defaults=defaults,
                vocab_size=self.model.config.get_text_config(decoder=True).vocab_size,
                max_model_len=self.max_model_len,
                max_num_seqs=max_num_seqs,
                accounting=self._accounting,
                could_admit=self._engine.could_admit,
                device=self._runner.device,
            )
        except BaseException:
            self._runner.close()
            raise
        self._library = Library(self._engine, self._runner, self._accounting, self.max_model_len)
        self._finalizer = weakref.finalize(self, self._engine.close)

    def generate(
        self,
        prompts: Prompt | Sequence_[Prompt],
        sampling_params: SamplingParams | Sequence_[SamplingParams] | None = None,
        *,
        document: Document | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answers one prompt or many, in their order.

        Args:
            prompts: texts or token ids; a list of integers is one prompt. Control tokens in these texts are control
                tokens; in documents and messages (`chat_prompt`) they are text.
            sampling_params: for all prompts, or one for each. Default: `SamplingParams()`.
            document: what every prompt goes on from.
            progress: show a bar on standard error.

        Raises:
            RequestTooLong: a prompt and its answer exceed max_model_len or the memory; nothing was run then.
            RequestFailed: the engine failed on one of them, and goes on.
            EngineClosed: the engine was closed before all were finished; EngineDead: it failed and cannot go on.
        """
        wanted = as_prompts(prompts)
        params = as_params(sampling_params, len(wanted))
        make = [
            functools.partial(self._intake.request, prompt, one, document)
            for prompt, one in zip(wanted, params, strict=True)
        ]
        return answer_all(self._engine, make, progress)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        document: Document | None = None,
        request_id: str | None = None,
        on_queued: Callable[[], None] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as they grow, each with everything so far; the last one is finished.

        Leaving the loop early (`aclose`) cancels the request. The request starts with the first iteration.

        Args:
            on_queued: called at the first iteration, once the engine has taken the request and only its turn is waited
                for.

        Raises:
            RequestTooLong: here; QueueFull and EngineClosed: at the first iteration.
        """
        [params] = as_params(sampling_params, 1)
        request = self._intake.request(prompt, params, document, lambda item: None)
        request.id = request_id or request.id
        return follow(self._engine, request, self, on_queued)

    def cancel(self, request_id: str) -> bool:
        """Ends a request, whose last output then says so; False when there is none that is open."""
        return self._engine.cancel(request_id)

    def chat_prompt(self, messages: list[dict[str, Any]], *, document: Document | None = None) -> list[int]:
        """Token ids of messages in the model's chat format, for `generate` or `stream` with the same `document`."""
        history = 0 if document is None else document.num_tokens
        return encode_chat(
            self._intake.need_tokenizer("messages"),
            messages,
            after_document=document is not None,
            check=functools.partial(self._intake.check_text, history=history),
        )

    def add_document(
        self,
        text: str | list[int],
        *,
        name: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Document:
        """Reads a document, beside whatever else is running; blocks until it is there.

        Args:
            text: the document, which becomes the beginning of a user's message, or token ids.
            on_progress: called in this thread with (tokens read, all tokens), also while nothing happens; an exception
                that it raises ends the reading.

        Raises:
            ValueError: it is empty. RequestTooLong, QueueFull, EngineClosed.
        """
        tokens: object = text
        if isinstance(text, str):
            tokenizer = self._intake.need_tokenizer("texts")
            tokens = encode_document(tokenizer, text, check=self._intake.check_document)
        return self._library.read(self._intake.checked_tokens(tokens), name, on_progress)

    def check_document(self, text: str) -> None:
        """Raises RequestTooLong, in a moment, for a text that is surely too long for `add_document`."""
        self._intake.check_document(text)

    def load_document(self, path: str | Path) -> Document:
        """A document that `Document.save` wrote, with its id and name.

        Raises:
            DocumentError: in one line, why the file cannot be used by this engine.
        """
        return self._library.load(Path(path).expanduser())

    def remove_document(self, document: Document) -> None:
        """Forgets a document; requests that use it go on. Harmless when it is gone already."""
        check_document(document)
        self._engine.remove(document)

    def statistics(self) -> EngineStatistics:
        """The engine now."""
        return self._engine.statistics()

    @property
    def is_closed(self) -> bool:
        """Whether every further request raises EngineClosed."""
        return self._engine.is_closed

    @property
    def has_failed(self) -> bool:
        """Whether the engine failed and cannot go on: every further request raises EngineDead."""
        return self._engine.has_failed

    def close(self) -> None:
        """Ends every open request with EngineClosed and gives the model its own attention back. Repeatable."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
