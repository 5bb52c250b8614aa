"""What a step's logits mean for its jobs: tokens for completions, first tokens for prompts, finished documents."""

import time
from collections.abc import Callable, Sequence

import torch

from longshadow.engine.runtime.batch import Chunk
from longshadow.engine.runtime.counters import Counters
from longshadow.engine.runtime.failures import Failures
from longshadow.engine.runtime.holdings import Holdings
from longshadow.engine.runtime.prefixes import head_of
from longshadow.engine.runtime.requests import Completion, Reading, Request
from longshadow.engine.runtime.sampling import choose_tokens
from longshadow.engine.runtime.scheduler import Job, Scheduler
from longshadow.engine.runtime.starts import Starts


class Outcomes:
    """Applies what a step computed. The engine's lock is held."""

    def __init__(
        self,
        scheduler: Scheduler,
        holdings: Holdings,
        starts: Starts,
        counters: Counters,
        failures: Failures,
        finish_document: Callable[[Reading], None],
    ) -> None:
        """`finish_document` takes up a document whose last token has been read."""
        self._failures = failures
        self._scheduler, self._holdings, self._starts, self._counters = scheduler, holdings, starts, counters
        self._finish_document = finish_document

    def take_decoded(
        self, decoding: Sequence[tuple[Request, Completion]], logits_BV: torch.Tensor | None
    ) -> set[Request]:
        """Samples every decoding completion's next token; the requests that have new ones."""
        if logits_BV is None:
            return set()
        tokens = choose_tokens(logits_BV, [completion.sampler for _, completion in decoding])
        for (request, completion), token, logits_V in zip(decoding, tokens, logits_BV, strict=True):
            with self._failures.of(request):
                self._accept(request, completion, token, logits_V)
        return {request for request, _ in decoding}

    def take_read(
        self, plan: Sequence[tuple[Job, int]], chunks: Sequence[Chunk], logits_RV: torch.Tensor | None
    ) -> set[Request]:
        """Counts what has been read; where a prompt ends, the requests' first tokens or documents."""
        rows = iter(() if logits_RV is None else logits_RV)
        changed = set()
        for (job, count), chunk in zip(plan, chunks, strict=True):
            job.num_read += count
            logits_V = next(rows) if chunk.is_last else None
            assert isinstance(job, Request | Reading)
            with self._failures.of(job):
                if isinstance(job, Reading):
                    job.sink((job.num_read, job.num_prompt))
                    if chunk.is_last:
                        self._finish_document(job)
                elif logits_V is not None:
                    self._keep_head(job, chunk)
                    self._start_decoding(job, logits_V)
                    changed.add(job)
        return changed

    def _accept(self, request: Request, completion: Completion, token: int | Exception, logits_V: torch.Tensor) -> None:
        if isinstance(token, Exception):
            raise token
        now = time.monotonic()
        completion.accept(token, logits_V)
        self._counters.num_generated += 1
        request.first_token = request.first_token or now
        if completion.finish_reason is not None:
            if request.is_finished:
                request.finished = now
            else:
                self._scheduler.finish_completion(request)

    def _keep_head(self, job: Request, chunk: Chunk) -> None:
        """Ends a prompt's reading and offers its exact tokens to later prompts, if there is memory for them."""
        head = None
        if job.keeps_head and self._holdings.prefixes is not None:
            head = head_of(chunk, job.prompt, self._starts.head_bytes(self._holdings.prefixes, job.num_prompt))
        chunk.state.forget_blocks()
        self._scheduler.finish_reading(job)
        if head is not None:
            self._holdings.keep(head)

    def _start_decoding(self, job: Request, logits_V: torch.Tensor) -> None:
        assert job.state is not None
        for completion in job.completions[1:]:
            completion.state = job.state.fork(job.max_tokens)
        job.completions[0].state, job.state = job.state, None
        tokens = choose_tokens(
            logits_V.expand(len(job.completions), -1), [completion.sampler for completion in job.completions]
        )
        for completion, token in zip(job.completions, tokens, strict=True):
            self._accept(job, completion, token, logits_V)
