"""The search for the longest length, over needs that are made up."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cpbench.bracket import Bracket, LengthSearch, Room

UNIT = 65536
LIMIT = 512 * UNIT


class Needs:
    """Linear device and host needs with a kink; counts how often it is asked."""

    def __init__(
        self, device: tuple[float, float], host: float = 0, kink: tuple[int, float] = (0, 0)
    ) -> None:
        self.device, self.host, self.kink = device, host, kink
        self.asked: list[int] = []

    def __call__(self, length: int) -> Room:
        assert length % UNIT == 0
        assert UNIT <= length <= LIMIT
        assert length not in self.asked
        self.asked.append(length)
        start, more = self.kink
        return Room(
            self.device[0] - self.device[1] * length - more * max(0, length - start),
            1e12 - self.host * length,
        )

    def longest(self) -> int:
        """By trying all lengths."""
        fitting = [
            n for n in range(UNIT, LIMIT + 1, UNIT) if Needs(self.device, self.host, self.kink)(n).fits
        ]
        return max(fitting, default=0)


def searched(need: Needs, *, start: int, slope: Room | None = None, limit: int = LIMIT) -> Bracket:
    search = LengthSearch(unit=UNIT, limit=limit, start=start, slope=slope)
    while (length := search.next_length) is not None:
        search.add(length, need(length))
    return search.found


needs = st.builds(
    Needs,
    st.tuples(st.floats(-1e9, 2e11), st.floats(1, 1e5)),
    st.floats(0, 1e6),
    st.tuples(st.integers(0, LIMIT), st.floats(0, 1e5)),
)


@example(Needs((0.0, 1.0)), 2 * UNIT, (2.2e-309, 0.0))  # a slope so small that the line ends nowhere
@given(needs, st.integers(1, 600 * UNIT), st.none() | st.tuples(st.floats(-1e3, 1e5), st.floats(0, 1e6)))
def test_the_answer_is_that_of_trying_all_lengths(
    need: Needs, start: int, slope: tuple[float, float] | None
) -> None:
    """Wherever it starts and whatever slope it is told, and the neighbour was tried."""
    expected = need.longest()

    found = searched(need, start=start, slope=None if slope is None else Room(*slope))

    assert found.longest == expected
    assert found.shortest_too_long == (None if expected == LIMIT else expected + UNIT)
    assert set(found.samples) == set(need.asked)
    assert expected == 0 or found.samples[expected].fits
    assert len(need.asked) <= 24


@pytest.mark.parametrize(
    ("need", "most"), [(Needs((7.5e10, 5000.0)), 4), (Needs((7.5e10, 3000.0), host=87_000.0), 4)]
)
def test_lines_take_four_samples(need: Needs, most: int) -> None:
    """Two say where the room ends, two show it; a known slope saves one."""
    found = searched(need, start=2**20)
    assert found.longest == need.longest()
    assert len(need.asked) <= most

    again = Needs(need.device, need.host)
    searched(again, start=2**20, slope=found.slope)
    assert len(again.asked) <= most - 1


def test_a_limit_below_the_unit_is_refused() -> None:
    """There would be nothing to try."""
    with pytest.raises(ValueError, match="below the unit"):
        LengthSearch(unit=UNIT, limit=UNIT - 1, start=UNIT)
