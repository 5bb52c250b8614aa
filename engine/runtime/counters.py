"""What an engine has done so far, and how fast it is now."""

import time
from collections import deque
from collections.abc import Sequence

from longshadow.engine.runtime.holdings import Holdings
from longshadow.engine.runtime.outputs import EngineStatistics
from longshadow.engine.runtime.scheduler import Job, Scheduler
from longshadow.engine.shadowkv.decode import StepCounts

RATE_SECONDS = 10.0


class Counters:
    """Tokens since the start, and generated ones of the last seconds."""

    def __init__(self) -> None:
        self.num_prompt = self.num_cached = self.num_generated = self.num_failed = 0
        self._recent: deque[tuple[float, int]] = deque()

    def note_step(self, plan: Sequence[tuple[Job, int]], num_decoded: int) -> None:
        """Counts a step that has been computed, and not been taken note of by its jobs yet."""
        self.num_prompt += sum(count for _, count in plan)
        first_tokens = sum(job.num_slots for job, count in plan if job.num_read + count == job.num_prompt)
        self._recent.append((time.monotonic(), num_decoded + first_tokens))
        while self._recent[0][0] < self._recent[-1][0] - RATE_SECONDS:
            self._recent.popleft()

    def statistics(self, scheduler: Scheduler, holdings: Holdings, counts: StepCounts) -> EngineStatistics:
        """The engine now."""
        since = time.monotonic() - RATE_SECONDS
        recent = sum(count for moment, count in self._recent if moment >= since)
        candidates, prefixes, budget = counts.hits + counts.misses, holdings.prefixes, scheduler.budget
        return EngineStatistics(
            num_running=len(scheduler.reading) + sum(job.num_slots for job in scheduler.decoding),
            num_waiting=len(scheduler.waiting),
            num_documents=len(holdings.documents),
            num_failed=self.num_failed,
            num_generated_tokens=self.num_generated,
            num_prompt_tokens=self.num_prompt,
            num_cached_tokens=self.num_cached,
            tokens_per_second=recent / RATE_SECONDS,
            hit_rate=counts.hits / candidates if candidates else 0.0,
            attended_fraction=counts.attended_tokens / counts.context_tokens if counts.context_tokens else 1.0,
            prefix_cache_hits=0 if prefixes is None else prefixes.num_hits,
            prefix_cache_queries=0 if prefixes is None else prefixes.num_queries,
            device_bytes=budget.reserved.device,
            device_limit_bytes=budget.device_limit,
            host_bytes=budget.reserved.host,
            host_limit_bytes=budget.host_limit,
        )
