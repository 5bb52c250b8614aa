"""Which requests are admitted, and how many tokens of which prompts a step reads. Knows counts and bytes, no tensors.

Requests are admitted in the order they came: one that does not fit yet holds back those behind it, so none starves.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from longshadow.engine.runtime.accounting import Need
from longshadow.engine.runtime.batch_room import BatchReservation, Room
from longshadow.engine.runtime.errors import QueueFull
from longshadow.engine.runtime.limits import CHUNK_MULTIPLE
from longshadow.engine.runtime.memory import Bytes, MemoryBudget


@dataclass(eq=False, kw_only=True)
class Job:
    """Something that reads a prompt and may then decode.

    Attributes:
        num_prompt: tokens to read.
        num_slots: sequences that decode afterwards.
        num_read: tokens that have been read, or were there already.
        reserved: what it holds of the memory budget.
    """

    num_prompt: int
    num_slots: int
    need: Need
    num_read: int = 0
    reserved: Bytes = field(default_factory=Bytes)


class Scheduler:
    """Waiting, reading and decoding jobs of an engine."""

    def __init__(
        self,
        budget: MemoryBudget,
        *,
        max_num_seqs: int,
        max_prefill_tokens: int,
        max_num_waiting: int,
        evict: Callable[[], bool],
        batch: BatchReservation | None = None,
    ) -> None:
        """`evict` frees some memory that nothing depends on; False when there is none."""
        self.budget = budget
        self.batch = batch or BatchReservation(budget, lambda room: 0, lambda room: None)
        self.waiting: deque[Job] = deque()
        self.reading: list[Job] = []
        self.decoding: list[Job] = []
        self.num_free_slots = max_num_seqs
        self._max_prefill_tokens = max_prefill_tokens
        self._max_num_waiting = max_num_waiting
        self._evict = evict

    def submit(self, job: Job) -> None:
        """Queues a job. Raises QueueFull."""
        if len(self.waiting) >= self._max_num_waiting:
            raise QueueFull(f"{len(self.waiting)} requests are waiting already, the most that may; try again later")
        self.waiting.append(job)

    def plan(
        self, admitted: Callable[[Job], None], may_start: Callable[[Job], bool] = lambda job: True
    ) -> list[tuple[Job, int]]:
        """Jobs and how many tokens of each this step reads; admits waiting jobs while tokens are left.

        `admitted` is called for each new job after its memory was reserved; it may set `num_read`. A job that
        `may_start` refuses, until one that is being read has been, waits for a later step.
        """
        chunks, left = [], self._max_prefill_tokens
        for job in self.reading:
            if count := _chunk(job, left):
                chunks.append((job, count))
                left -= count
        while left >= CHUNK_MULTIPLE and self.waiting and self._can_admit(self.waiting[0]):
            if not may_start(self.waiting[0]):
                break
            job = self.waiting.popleft()
            self._admit(job)
            admitted(job)
            if count := _chunk(job, left):
                chunks.append((job, count))
                left -= count
        return chunks

    def plan_alone(self, job: Job) -> list[tuple[Job, int]]:
        """The same for a job that is being read, and no other."""
        assert job in self.reading
        return [(job, _chunk(job, self._max_prefill_tokens))]

    def _can_admit(self, job: Job) -> bool:
        if job.num_slots > self.num_free_slots:
            return False
        while self._room_with(job) is None:
            if not self._evict():
                return False
        return True

    def _room_with(self, job: Job) -> Room | None:
        """What the batch may hold when this job is admitted; None when there is not enough memory."""
        least = self._least_room(job)
        for room in (self.batch.room.joined(least), least):
            if self.budget.fits(job.need.prefill + self.batch.change(room)):
                return room
        return None

    def _least_room(self, *more: Job) -> Room:
        jobs = [*self.reading, *self.decoding, *more]
        return Room.of((job.num_slots, job.need.room) for job in jobs)

    def need_together(self, need: Need, num_slots: int, num_jobs: int = 1) -> Bytes:
        """What so many jobs of a kind need when there are no others, all of them reading their prompts."""
        return need.prefill * num_jobs + self.batch.bytes(Room.of([(num_slots * num_jobs, need.room)]))

    def _admit(self, job: Job) -> None:
        room = self._room_with(job)
        assert room is not None
        self.batch.take(room)
        self.budget.reserve(job.need.prefill)
        job.reserved = job.need.prefill
        self.num_free_slots -= job.num_slots
        self.reading.append(job)

    def finish_reading(self, job: Job) -> None:
        """The whole prompt has been read: gives back what only that needed."""
        self.reading.remove(job)
        self.decoding.append(job)
        afterwards = job.need.shared + job.need.completion * job.num_slots
        self.budget.release(job.reserved - afterwards)
        job.reserved = afterwards

    def finish_completion(self, job: Job) -> None:
        """One of a job's sequences has ended: gives back its slot and memory."""
        assert job in self.decoding and job.num_slots > 0
        job.num_slots -= 1
        self.num_free_slots += 1
        self.budget.release(job.need.completion)
        job.reserved -= job.need.completion
        self.batch.shrink(self._least_room())

    def leave(self, job: Job) -> None:
        """The job is over, wherever it stood: gives back all it holds. Harmless when it has left."""
        if job in self.waiting:
            self.waiting.remove(job)
            return
        running = self.reading if job in self.reading else self.decoding
        if job not in running:
            return
        running.remove(job)
        self.num_free_slots += job.num_slots
        self.budget.release(job.reserved)
        job.num_slots, job.reserved = 0, Bytes()
        self.batch.shrink(self._least_room())


def _chunk(job: Job, left: int) -> int:
    """Tokens of a prompt that a step with `left` tokens reads."""
    rest = job.num_prompt - job.num_read
    if rest <= left:
        return rest
    stop = job.num_read + left
    return max(0, stop - stop % CHUNK_MULTIPLE - job.num_read)
