from hypothesis import given
from hypothesis import strategies as st

from longshadow.engine.runtime.seats import Seats
from longshadow.engine.runtime.state import SequenceState


@given(steps=st.lists(st.tuples(st.sets(st.integers(0, 9), max_size=5), st.integers(5, 7)), max_size=12))
def test_who_stays_keeps_its_place_and_who_leaves_is_let_go(steps: list[tuple[set[int], int]]) -> None:
    states = [SequenceState(layers=[]) for _ in range(10)]
    vacated: list[int] = []
    seats = Seats(vacated.append)
    before: dict[int, int] = {}
    num_before = 0
    for wanted, num_places in steps:
        vacated.clear()
        places = dict(zip(wanted, seats.take([states[index] for index in wanted], num_places), strict=True))
        assert len(set(places.values())) == len(wanted) and len(seats.states) == num_places
        assert all(seats.states[place] is states[index] for index, place in places.items())
        assert sum(state is not None for state in seats.states) == len(wanted)
        if num_places == num_before:
            assert all(places[index] == place for index, place in before.items() if index in wanted)
            assert sorted(vacated) == sorted(place for index, place in before.items() if index not in wanted)
        assert all((state.seats is seats) == (index in wanted) for index, state in enumerate(states))
        before, num_before = places, num_places
    for index, place in before.items():
        vacated.clear()
        states[index].release()
        states[index].release()
        assert vacated == [place] and seats.states[place] is None
