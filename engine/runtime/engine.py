"""The engine's loop: one thread that admits, reads, decodes and delivers, step by step.

Other threads only put jobs into it, mark them as cancelled, and hold documents; `_lock` guards what they share.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import torch

from longshadow.engine.runtime.accounting import Accounting, Need
from longshadow.engine.runtime.batch import Chunk
from longshadow.engine.runtime.batch_room import BatchReservation
from longshadow.engine.runtime.counters import Counters
from longshadow.engine.runtime.documents import Document
from longshadow.engine.runtime.errors import EngineClosed, EngineDead, RequestTooLong
from longshadow.engine.runtime.failures import Failures, tell_failed
from longshadow.engine.runtime.holdings import Holdings
from longshadow.engine.runtime.memory import Bytes, MemoryBudget
from longshadow.engine.runtime.outcomes import Outcomes
from longshadow.engine.runtime.outputs import EngineStatistics
from longshadow.engine.runtime.prefixes import PrefixCache
from longshadow.engine.runtime.requests import Completion, Reading, Request
from longshadow.engine.runtime.runner import ModelRunner
from longshadow.engine.runtime.scheduler import Job, Scheduler
from longshadow.engine.runtime.starts import Starts, next_chunk

# In a row, of which nothing could be decoded.
MOST_FAILED_STEPS = 3

logger = logging.getLogger(__name__)


class Engine:
    """Runs jobs until it is closed."""

    def __init__(
        self,
        runner: ModelRunner,
        accounting: Accounting,
        budget: MemoryBudget,
        *,
        fixed: Bytes,
        prefixes: PrefixCache | None,
        max_num_seqs: int,
        max_prefill_tokens: int,
        max_num_waiting: int,
    ) -> None:
        """`fixed`: what the engine itself takes. Raises ValueError when that does not fit."""
        self.runner, self.budget = runner, budget
        self.holdings = Holdings(budget, fixed, prefixes)
        self.scheduler = Scheduler(
            budget,
            max_num_seqs=max_num_seqs,
            max_prefill_tokens=max_prefill_tokens,
            max_num_waiting=max_num_waiting,
            evict=self.holdings.evict,
            batch=BatchReservation(budget, runner.room_bytes, runner.hold),
        )
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._requests: dict[str, Request] = {}
        self._closed: EngineClosed | None = None
        self._failures = Failures()
        # Those of a step that failed, of which each is read by itself until one fails, or all have been read.
        self._suspects: list[Request | Reading] = []
        self._num_failed_steps = 0
        self._counters = Counters()
        self._starts = Starts(runner, accounting, prefixes, self._counters)
        self._outcomes = Outcomes(
            self.scheduler,
            self.holdings,
            self._starts,
            self._counters,
            self._failures,
            finish_document=self._finish_document,
        )
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="longshadow-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Request | Reading) -> None:
        """Queues a job. Raises QueueFull, EngineClosed, and RequestTooLong for one that could never be admitted."""
        with self._lock:
            self._check_open()
            if isinstance(job, Request):
                if job.id in self._requests:
                    raise ValueError(f"a request with the id {job.id!r} is open already")
                if job.document is not None:
                    self.holdings.check(job.document)
            self._check_size(job)
            self.scheduler.submit(job)
            if isinstance(job, Request):
                self._requests[job.id] = job
                if job.document is not None:
                    job.document.num_users += 1
            self._wake.notify_all()

    def check_sizes(self, jobs: Sequence[Job]) -> None:
        """Raises RequestTooLong if one of them could never be admitted."""
        with self._lock:
            for job in jobs:
                self._check_size(job)

    def could_admit(self, need: Need, num_slots: int, num_jobs: int = 1) -> bool:
        """Whether so many jobs of this need would be admitted together if there were no others."""
        with self._lock:
            together = self.scheduler.need_together(need, num_slots, num_jobs)
            return self.budget.could_fit(together, beside=self.holdings.held)

    def _check_size(self, job: Job) -> None:
        if not self.could_admit(job.need, job.num_slots):
            need, left = self.scheduler.need_together(job.need, job.num_slots), self.budget.limits - self.holdings.held
            raise RequestTooLong(
                f"{job.num_prompt:,} tokens and their answers need {need.device:,} bytes of device and {need.host:,} "
                f"of host memory, beside the engine's documents there are {left.device:,} and {left.host:,}"
            )

    def cancel(self, job_id: str) -> bool:
        """Ends a request after the current step; False when it is not open."""
        with self._lock:
            request = self._requests.get(job_id)
            if request is None or request.is_cancelled:
                return False
            request.is_cancelled = True
            self._wake.notify_all()
            return True

    def abandon(self, request: Request) -> None:
        """Ends this very request if it is open."""
        with self._lock:
            if self._requests.get(request.id) is request:
                self.cancel(request.id)

    def cancel_reading(self, job: Reading) -> None:
        """Ends the reading of a document after the current step, or forgets what has been read."""
        with self._lock:
            job.is_cancelled = True
            if job.document is not None:
                self.holdings.remove(job.document)
            self._wake.notify_all()

    def reserve(self, need: Bytes) -> None:
        """Takes memory for a document from elsewhere. Raises RequestTooLong when there is not enough now."""
        with self._lock:
            self._check_open()
            self.holdings.reserve(need)

    def release(self, reserved: Bytes) -> None:
        """Gives back what `reserve` took."""
        with self._lock:
            self.budget.release(reserved)
            self._wake.notify_all()

    def hold(self, document: Document) -> None:
        """Takes up a document from elsewhere, whose memory is reserved; its id changes when it is taken."""
        with self._lock:
            self._check_open()
            self.holdings.hold(document)
            self._refuse_impossible()

    def remove(self, document: Document) -> None:
        """Forgets a document; its memory is given back when no request shares it."""
        with self._lock:
            if self.holdings.remove(document):
                self._wake.notify_all()

    def _refuse_impossible(self) -> None:
        """Documents take memory for good: what waits for more than is left would wait forever."""
        for job in list(self.scheduler.waiting):
            assert isinstance(job, Request | Reading)
            try:
                self._check_size(job)
            except RequestTooLong as error:
                self._leave(job)
                job.sink(error)

    def close(self) -> None:
        """Fails every open job with EngineClosed and ends the thread. Repeatable."""
        with self._lock:
            self._closed = self._closed or EngineClosed("the engine was closed")
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more jobs: it was closed, or it failed."""
        return self._closed is not None

    @property
    def has_failed(self) -> bool:
        """Whether it has failed and cannot go on."""
        return isinstance(self._closed, EngineDead)

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            raise EngineClosed("the engine stayed in the process that this one was forked from; make an LLM here")
        if self._closed is not None:
            raise type(self._closed)(str(self._closed)) from self._closed.__cause__

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._step()
        # Whatever it is, nobody may wait for ever.
        except BaseException as error:
            logger.critical("the engine failed and has ended; every open request fails", exc_info=error)
            with self._lock:
                self._closed = EngineDead(f"the engine failed: {type(error).__name__}: {error}")
                self._closed.__cause__ = error
        with self._lock:
            assert self._closed is not None
            for job in self._open_jobs():
                with suppress(Exception):
                    self._leave(job)
                with suppress(Exception):
                    job.sink(self._closed)
            while self.holdings.evict():
                pass
            self._wake.notify_all()
        self.runner.close()

    def _open_jobs(self) -> list[Request | Reading]:
        scheduler = self.scheduler
        jobs = [*scheduler.waiting, *scheduler.reading, *scheduler.decoding]
        assert all(isinstance(job, Request | Reading) for job in jobs)
        return jobs  # type: ignore[return-value]

    def _wait_for_work(self) -> bool:
        with self._lock:
            while self._closed is None and not self._open_jobs():
                self._wake.wait()
            return self._closed is None

    def _step(self) -> None:
        with self._lock:
            self._drop_cancelled()
            plan = self._plan()
            chunks = [next_chunk(job, count) for job, count in plan]
            decoding = [
                (job, completion)
                for job in self.scheduler.decoding
                if isinstance(job, Request)
                for completion in job.completions
                if completion.finish_reason is None
            ]
            if not chunks and not decoding:
                self._let_failed_go()
                # Only jobs that wait for memory or slots of others, which every change of those wakes.
                if self._closed is None and self._open_jobs():
                    self._wake.wait(timeout=1.0)
                return
        plan, chunks, read = self._read(plan, chunks)
        decoding, decoded = self._decode(decoding)
        with self._lock:
            self._counters.note_step(plan, len(decoding))
            changed = self._outcomes.take_decoded(decoding, decoded) | self._outcomes.take_read(plan, chunks, read)
            for request in changed:
                if request.is_finished and request not in self._failures:
                    self._leave(request)
        for request in sorted(changed, key=lambda request: request.arrival):
            if request not in self._failures and (request.streams or request.is_finished):
                with self._failures.of(request):
                    request.sink(request.output())
        with self._lock:
            self._let_failed_go()

    def _plan(self) -> list[tuple[Job, int]]:
        """Which jobs read how many tokens; new ones have begun."""
        reading = self.scheduler.reading
        self._suspects = [job for job in self._suspects if job in reading]
        if self._suspects:
            return self.scheduler.plan_alone(self._suspects[0])
        plan = self.scheduler.plan(self._begin, lambda job: self._starts.may_start(job, reading))
        return [(job, count) for job, count in plan if job not in self._failures]

    def _begin(self, job: Job) -> None:
        assert isinstance(job, Request | Reading)
        with self._failures.of(job):
            self._starts.begin(job)

    def _read(
        self, plan: list[tuple[Job, int]], chunks: list[Chunk]
    ) -> tuple[list[tuple[Job, int]], list[Chunk], torch.Tensor | None]:
        """Reads chunks; those of a step that fails are read again, each by itself, to tell whose failure it is."""
        try:
            return plan, chunks, self.runner.read(chunks) if chunks else None
        except Exception as error:
            self._check_health(error)
            with self._lock:
                jobs = [job for job, _ in plan if isinstance(job, Request | Reading)]
                if len(jobs) == 1:
                    self._failures.add(jobs[0], error)
                else:
                    logger.warning("a step failed that read %d prompts; each is read alone", len(jobs), exc_info=error)
                    self._suspects = jobs
                    for job in jobs:
                        job.state, job.num_read = None, 0
                        self._begin(job)
            return [], [], None

    def _decode(
        self, decoding: list[tuple[Request, Completion]]
    ) -> tuple[list[tuple[Request, Completion]], torch.Tensor | None]:
        """Decodes together; where that fails, one by one, to tell whose failure it is. Those that have logits."""
        if not decoding:
            return [], None
        try:
            logits = self._logits(decoding)
            self._num_failed_steps = 0
            return decoding, logits
        except Exception as error:
            self._check_health(error)
            states = [completion.state for _, completion in decoding]
            whole = [state is not None and state.rewind() for state in states]
            if len(decoding) > 1:
                logger.warning(
                    "a step failed that decoded %d answers; each goes on alone", len(decoding), exc_info=error
                )
            done, rows = [], []
            for (request, completion), is_whole in zip(decoding, whole, strict=True):
                if not is_whole or len(decoding) == 1:
                    self._failures.add(request, error)
                    continue
                with self._failures.of(request):
                    rows.append(self._logits([(request, completion)]))
                    done.append((request, completion))
            self._num_failed_steps = 0 if done else self._num_failed_steps + 1
            # Where sequences decode as a batch, the probe does not tell whether they can.
            if self.runner.batched is not None and self._num_failed_steps == MOST_FAILED_STEPS:
                raise
            return done, torch.cat(rows) if rows else None

    def _logits(self, decoding: Sequence[tuple[Request, Completion]]) -> torch.Tensor:
        states = []
        for _, completion in decoding:
            assert completion.state is not None
            states.append(completion.state)
        return self.runner.decode(states, [completion.token_ids[-1] for _, completion in decoding])

    def _check_health(self, error: Exception) -> None:
        """After a step that failed: frees what can be spared. Raises the error where the model runs no more."""
        with self._lock:
            while self.holdings.evict():
                pass
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            self.runner.probe()
        except Exception:
            raise error from None

    def _let_failed_go(self) -> None:
        for job, error in self._failures.take():
            self._leave(job)
            self._counters.num_failed += 1
            tell_failed(job, error)

    def _finish_document(self, job: Reading) -> None:
        """Takes up a document that has been read; what it needs stays reserved."""
        if job.is_cancelled:
            self._leave(job)
            return
        assert job.state is not None
        job.state.forget_blocks()
        self.scheduler.finish_reading(job)
        job.document = job.build(job.state, job.reserved)
        self.scheduler.decoding.remove(job)
        self.holdings.hold(job.document)
        self._refuse_impossible()
        job.sink(job.document)

    def _drop_cancelled(self) -> None:
        for job in self._open_jobs():
            if not job.is_cancelled:
                continue
            self._leave(job)
            if isinstance(job, Request):
                with self._failures.of(job):
                    job.cancel()
                    job.finished = time.monotonic()
                    job.sink(job.output())

    def _leave(self, job: Request | Reading) -> None:
        """Takes a job out, with all it holds. Harmless when it has left."""
        self.scheduler.leave(job)
        job.state = None
        if isinstance(job, Request) and self._requests.get(job.id) is job:
            del self._requests[job.id]
            if job.document is not None:
                job.document.num_users -= 1
                self.holdings.give_back(job.document)

    def statistics(self) -> EngineStatistics:
        """The engine now."""
        with self._lock:
            return self._counters.statistics(self.scheduler, self.holdings, self.runner.counts)
