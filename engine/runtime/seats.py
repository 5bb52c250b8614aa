"""Which sequence decodes at which place of the batch: a sequence that stays keeps its place."""

from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longshadow.engine.runtime.state import SequenceState


class Seats:
    """The places of a batch, some of them empty.

    Attributes:
        states: who has each place.
    """

    def __init__(self, vacate: Callable[[int], None]) -> None:
        """`vacate` hears of every place whose sequence leaves while the others stay."""
        self.states: list[SequenceState | None] = []
        self._vacate = vacate

    def take(self, states: Sequence_["SequenceState"], num_places: int) -> list[int]:
        """Gives these sequences, and no others, places of a batch of this size. Returns their places."""
        assert len(states) <= num_places
        if len(self.states) != num_places:
            self.clear()
            self.states = [None] * num_places
        staying = {id(state) for state in states}
        for state in list(self.states):
            if state is not None and id(state) not in staying:
                self.leave(state)
        free = iter([place for place, held in enumerate(self.states) if held is None])
        for state in states:
            if state.seats is not self:
                self.states[next(free)] = state
                state.seats = self
        places = {id(state): place for place, state in enumerate(self.states)}
        return [places[id(state)] for state in states]

    def leave(self, state: "SequenceState") -> None:
        """A sequence gives its place up."""
        place = next(place for place, held in enumerate(self.states) if held is state)
        self.states[place] = None
        state.seats = None
        self._vacate(place)

    def clear(self) -> None:
        """Nobody has a place any more."""
        for state in self.states:
            if state is not None:
                state.seats = None
        self.states = []
