from longshadow.engine.runtime.batch_room import BatchReservation, Room, batch_size
from longshadow.engine.runtime.memory import Bytes, MemoryBudget
from longshadow.engine.shadowkv.step_buffers import Capacity


def chunks(num_chunks: int, num_slots: int = 0) -> Capacity:
    return Capacity(num_chunks=num_chunks, num_slots=num_slots)


def test_sizes_of_batches() -> None:
    assert [batch_size(count) for count in (0, 1, 2, 3, 5, 8, 9, 16, 17)] == [0, 1, 2, 4, 8, 8, 16, 16, 24]


def test_a_room_holds_every_sequence_at_every_place() -> None:
    assert Room.of([]) == Room()
    assert Room.of([(2, chunks(5)), (1, chunks(3, 7)), (0, chunks(99))]) == Room(num_places=4, each=chunks(5, 7))
    joined = Room(num_places=8, each=chunks(1, 7)).joined(Room(num_places=2, each=chunks(3, 2)))
    assert joined == Room(num_places=8, each=chunks(3, 7))


def test_memory_is_reserved_before_it_is_held_and_shrinks_when_much_is_free() -> None:
    budget = MemoryBudget(device_limit=100, host_limit=0, shared=False)
    held: list[Room] = []
    reservation = BatchReservation(budget, lambda room: room.num_places * room.each.num_chunks, held.append)
    large, medium, small = (Room(num_places=places, each=chunks(10)) for places in (8, 5, 4))
    reservation.take(large)
    reservation.take(large)
    assert budget.reserved == Bytes(device=80) and held == [large]
    reservation.shrink(medium)
    assert reservation.room == large and budget.reserved == Bytes(device=80)
    assert reservation.change(medium) == Bytes(device=-30) and reservation.change(small) == Bytes(device=-40)
    reservation.shrink(small)
    assert budget.reserved == Bytes(device=40) and held == [large, small]
    reservation.shrink(Room())
    assert budget.reserved == Bytes() and held == [large, small, Room()]
