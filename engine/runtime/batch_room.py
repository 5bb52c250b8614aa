"""The memory of the decoding batch, reserved for all admitted sequences at their longest before one of them decodes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from longshadow.engine.runtime.memory import Bytes, MemoryBudget
from longshadow.engine.shadowkv.step_buffers import Capacity

# A batch becomes smaller when no more than this share of its memory is needed: it is then made anew, with its graphs.
SHRINKING_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Room:
    """Places of the batch, and what each of them has room for."""

    num_places: int = 0
    each: Capacity = field(default_factory=Capacity)

    @classmethod
    def of(cls, wanted: Iterable[tuple[int, Capacity]]) -> "Room":
        """For groups of so many sequences that need so much each."""
        num_sequences, each = 0, Capacity()
        for count, need in wanted:
            if count:
                num_sequences, each = num_sequences + count, each.joined(need)
        return cls(num_places=batch_size(num_sequences), each=each)

    def joined(self, other: "Room") -> "Room":
        """Room for either."""
        return Room(num_places=max(self.num_places, other.num_places), each=self.each.joined(other.each))


class BatchReservation:
    """What is reserved for the batch; the batch never holds more.

    Attributes:
        room: what it may hold now.
    """

    def __init__(self, budget: MemoryBudget, size_of: Callable[[Room], int], hold: Callable[[Room], None]) -> None:
        """`size_of`: bytes of a batch. `hold` changes the batch: on return it holds nothing, or what fits `room`."""
        self.room = Room()
        self._budget = budget
        self._size_of = size_of
        self._hold = hold

    def bytes(self, room: Room) -> Bytes:
        """On the device."""
        return Bytes(device=self._size_of(room) if room.num_places else 0)

    def change(self, room: Room) -> Bytes:
        """What `take` would add; less than nothing where the batch becomes smaller."""
        return self.bytes(room) - self.bytes(self.room)

    def take(self, room: Room) -> None:
        """Makes this the batch's room; the change fits."""
        if room == self.room:
            return
        change, self.room = self.change(room), room
        self._hold(room)
        if change.device > 0:
            self._budget.reserve(change)
        else:
            self._budget.release(Bytes() - change)

    def shrink(self, least: Room) -> None:
        """`least` is needed from now on: gives memory back if that is much less than there is."""
        if self.bytes(least).device <= SHRINKING_SHARE * self.bytes(self.room).device:
            self.take(least)


def batch_size(num_sequences: int) -> int:
    """The fixed sizes in which sequences decode together: powers of two up to 8, then multiples of 8; 0 for none."""
    if num_sequences > 8:
        return -(-num_sequences // 8) * 8
    return 1 << (num_sequences - 1).bit_length() if num_sequences else 0
