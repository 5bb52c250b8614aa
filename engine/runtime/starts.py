"""How a job that got its memory begins: its sequence, what it shares with earlier prompts, and its next chunk."""

import time
from collections.abc import Sequence

from longshadow.engine.runtime.accounting import Accounting
from longshadow.engine.runtime.batch import Chunk
from longshadow.engine.runtime.counters import Counters
from longshadow.engine.runtime.memory import Bytes
from longshadow.engine.runtime.prefixes import PrefixCache, resume
from longshadow.engine.runtime.requests import Reading, Request
from longshadow.engine.runtime.runner import ModelRunner
from longshadow.engine.runtime.scheduler import Job
from longshadow.engine.runtime.state import BLOCK_TOKENS


class Starts:
    """Makes sequences for jobs; prompts that begin like earlier ones go on from their heads."""

    def __init__(
        self, runner: ModelRunner, accounting: Accounting, prefixes: PrefixCache | None, counters: Counters
    ) -> None:
        self._runner, self._accounting, self._prefixes, self._counters = runner, accounting, prefixes, counters

    def begin(self, job: Job) -> None:
        """A job has its memory: makes its sequence, from a document or from an earlier prompt's head."""
        if isinstance(job, Reading):
            job.state = self._runner.new_state(job.num_prompt, blocked_energy=True)
            return
        assert isinstance(job, Request)
        job.admitted = time.monotonic()
        if job.document is not None:
            job.state = job.document.state.fork(job.max_tokens)
            job.num_cached_tokens = job.document.num_tokens
        else:
            job.state = self._runner.new_state(job.max_tokens, blocked_energy=True)
            if self._prefixes is not None:
                self._use_prefix(job, self._prefixes)
        self._counters.num_cached += job.num_cached_tokens

    def may_start(self, job: Job, reading: Sequence[Job]) -> bool:
        """Not while a prompt is read whose head, once it is kept, saves this one more than any that is kept now."""
        prefixes = self._prefixes
        if prefixes is None or not isinstance(job, Request) or job.document is not None:
            return True
        read = [other for other in reading if isinstance(other, Request) and other.keeps_head]
        return not prefixes.would_gain(job.prompt, [other.prompt for other in read])

    def _use_prefix(self, job: Request, prefixes: PrefixCache) -> None:
        assert job.state is not None
        job.keeps_head = (
            job.num_prompt >= BLOCK_TOKENS
            and prefixes.admits(self.head_bytes(prefixes, job.num_prompt))
            and not prefixes.covers(job.prompt)
        )
        match = prefixes.match(job.prompt)
        if match is not None:
            head, num_tokens = match
            resume(job.state, head, num_tokens, job.num_prompt, self._runner.device)
            job.num_read = job.num_cached_tokens = num_tokens

    def head_bytes(self, prefixes: PrefixCache, num_prompt: int) -> Bytes:
        """What a prompt's kept head takes."""
        return prefixes.size(num_prompt, self._accounting.token_bytes, self._accounting.energy_bytes)


def next_chunk(job: Job, count: int) -> Chunk:
    """The next `count` tokens that a job reads."""
    assert isinstance(job, Request | Reading) and job.state is not None
    tokens = job.prompt if isinstance(job, Request) else job.tokens
    stop = job.num_read + count
    return Chunk(
        state=job.state,
        tokens=tokens[job.num_read : stop],
        is_last=stop == job.num_prompt,
        num_prompt=job.num_prompt,
        keeps_head=isinstance(job, Request) and job.keeps_head,
    )
