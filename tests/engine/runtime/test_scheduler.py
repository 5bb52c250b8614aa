from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from longshadow.engine.runtime.accounting import Need
from longshadow.engine.runtime.batch_room import BatchReservation, Room
from longshadow.engine.runtime.errors import QueueFull
from longshadow.engine.runtime.memory import Bytes, MemoryBudget
from longshadow.engine.runtime.scheduler import CHUNK_MULTIPLE, Job, Scheduler
from longshadow.engine.shadowkv.step_buffers import Capacity

SLOTS, TOKENS, WAITING = 3, 256, 5
LIMIT = Bytes(device=1000, host=600)


def make_job(num_prompt: int, num_slots: int, shared: int, own: int, extra: int, place: int = 0) -> Job:
    afterwards = Bytes(device=shared + own * num_slots, host=shared // 2)
    need = Need(
        prefill=afterwards + Bytes(device=extra, host=extra),
        shared=Bytes(device=shared, host=shared // 2),
        completion=Bytes(device=own),
        room=Capacity(num_slots=place),
    )
    return Job(num_prompt=num_prompt, num_slots=num_slots, need=need)


def make_scheduler(cached: list[int]) -> Scheduler:
    """`cached`: bytes that may be evicted."""
    budget = MemoryBudget(device_limit=LIMIT.device, host_limit=LIMIT.host, shared=False)
    budget.reserve(Bytes(host=sum(cached)))

    def evict() -> bool:
        if not cached:
            return False
        budget.release(Bytes(host=cached.pop()))
        return True

    return Scheduler(
        budget,
        max_num_seqs=SLOTS,
        max_prefill_tokens=TOKENS,
        max_num_waiting=WAITING,
        evict=evict,
        batch=BatchReservation(budget, lambda room: room.num_places * room.each.num_slots, lambda room: None),
    )


class Scheduling(RuleBasedStateMachine):
    """Random arrivals, steps, ends and cancellations."""

    @initialize(cached=st.lists(st.integers(1, 60), max_size=3))
    def start(self, cached: list[int]) -> None:
        self.cached = cached
        self.scheduler = make_scheduler(cached)
        self.arrived: list[Job] = []
        self.admitted: list[Job] = []

    @rule(
        num_prompt=st.integers(1, 900),
        num_slots=st.integers(0, SLOTS),
        shared=st.integers(0, 400),
        own=st.integers(0, 150),
        extra=st.integers(0, 100),
        place=st.integers(0, 150),
    )
    def submit(self, num_prompt: int, num_slots: int, shared: int, own: int, extra: int, place: int) -> None:
        job = make_job(num_prompt, num_slots, shared, own, extra, place)
        if not self.scheduler.budget.could_fit(self.scheduler.need_together(job.need, job.num_slots), beside=Bytes()):
            return
        if len(self.scheduler.waiting) == WAITING:
            with pytest.raises(QueueFull):
                self.scheduler.submit(job)
            return
        self.scheduler.submit(job)
        self.arrived.append(job)

    @rule()
    def step(self) -> None:
        chunks = self.scheduler.plan(self.admitted.append)
        assert sum(count for _, count in chunks) <= TOKENS
        for job, count in chunks:
            assert count > 0
            job.num_read += count
            assert job.num_read == job.num_prompt or job.num_read % CHUNK_MULTIPLE == 0
            if job.num_read == job.num_prompt:
                self.scheduler.finish_reading(job)

    @precondition(lambda self: self.scheduler.decoding)
    @rule(data=st.data())
    def end_completion(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.scheduler.decoding))
        if job.num_slots > 1:
            self.scheduler.finish_completion(job)
        else:
            self.scheduler.leave(job)

    @precondition(lambda self: self.open_jobs())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.open_jobs()))
        if job in self.scheduler.waiting:
            self.arrived.remove(job)
        self.scheduler.leave(job)

    def open_jobs(self) -> list[Job]:
        return [*self.scheduler.waiting, *self.scheduler.reading, *self.scheduler.decoding]

    @invariant()
    def memory_and_slots_add_up(self) -> None:
        scheduler = self.scheduler
        inside = [*scheduler.reading, *scheduler.decoding]
        held = sum((job.reserved for job in inside), Bytes(host=sum(self.cached)))
        held += scheduler.batch.bytes(scheduler.batch.room)
        assert scheduler.budget.reserved == held
        least = Room.of((job.num_slots, job.need.room) for job in inside)
        assert scheduler.batch.room.joined(least) == scheduler.batch.room
        assert held.device <= LIMIT.device and held.host <= LIMIT.host
        assert scheduler.num_free_slots == SLOTS - sum(job.num_slots for job in inside) >= 0

    @invariant()
    def admits_in_the_order_of_arrival(self) -> None:
        assert self.admitted == self.arrived[: len(self.admitted)]

    def teardown(self) -> None:
        """Whoever waits is served in the end, and nothing is left."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(200):
            self.step()
            for job in list(self.scheduler.decoding):
                self.scheduler.leave(job)
        assert not self.open_jobs()
        assert self.admitted == self.arrived
        assert self.scheduler.budget.reserved == Bytes(host=sum(self.cached))


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(prompts=st.lists(st.integers(1, 2000), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_step_reads_all_it_may(prompts: Sequence[int]) -> None:
    budget = MemoryBudget(device_limit=1, host_limit=1, shared=False)
    scheduler = Scheduler(budget, max_num_seqs=10, max_prefill_tokens=TOKENS, max_num_waiting=10, evict=lambda: False)
    for num_prompt in prompts:
        scheduler.submit(make_job(num_prompt, 1, 0, 0, 0))
    left = sum(prompts)
    while left:
        chunks = scheduler.plan(lambda job: None)
        count = sum(count for _, count in chunks)
        # Whole blocks, so at most one block's worth is not used.
        assert count == left or count > TOKENS - CHUNK_MULTIPLE
        for job, read in chunks:
            job.num_read += read
            if job.num_read == job.num_prompt:
                scheduler.finish_reading(job)
        left -= count


def test_a_job_that_does_not_fit_holds_back_those_behind_it() -> None:
    scheduler = make_scheduler([])
    first, large, small = (make_job(10, 1, size, 0, 0) for size in (800, 300, 1))
    for job in (first, large, small):
        scheduler.submit(job)
    admitted: list[Job] = []
    scheduler.plan(admitted.append)
    assert admitted == [first]
    scheduler.leave(first)
    scheduler.plan(admitted.append)
    assert admitted == [first, large, small]
