"""The anatomy of a peak, over timelines small enough to work out by hand."""

from __future__ import annotations

from cpbench.memory.anatomy import anatomy
from cpbench.memory.timeline import Allocation, Event

STEP = "step:1"


def made(size: int, *scope: str, site: str = "a.py:1 f", label: str | None = None) -> Event:
    return Event(Allocation(bytes=size, scope=(STEP, *scope), site=site, label=label), False, (STEP, *scope))


def freed(event: Event, *scope: str) -> Event:
    return Event(event.allocation, True, (STEP, *scope))


def two_peaks() -> list[Event]:
    """Weights of 10 throughout; attention 50 in forward (60); MLP 30 and loss 15 in backward (55); host memory."""
    weights = Event(Allocation(bytes=10, scope=(), site="w", label="sharded_parameters"), False, ())
    attention = made(50, "forward", "attention:0")
    mlp, loss = made(30, "backward", "mlp:0"), made(15, "backward", "loss")
    host = made(1000, "forward", label="host")
    return [
        weights,
        host,
        attention,
        freed(attention, "forward"),
        mlp,
        loss,
        freed(loss, "backward"),
        freed(mlp, "backward"),
    ]


def test_without_a_group_the_peak_may_lie_elsewhere() -> None:
    """Without attention the peak is not 60 - 50 but the 55 of the backward; host memory never counts."""
    found = anatomy(two_peaks(), step=STEP, host_bytes=7)

    assert (found.peak_bytes, found.peak.phase, found.peak.place) == (60, "forward", "attention:0")
    effects = {c.name: (c.bytes, c.peak_without_bytes, c.phase_without) for c in found.categories}
    assert effects["attention"] == (50, 55, "backward")
    assert effects["sharded_parameters"] == (10, 50, "forward")
    assert found.host_bytes == 7


def test_tensors_at_the_peak_add_up_to_it() -> None:
    """Equal tensors of several layers are one row; rows and the rest add up to the peak."""
    events = [made(4, "forward", f"attention:{layer}") for layer in range(3)]
    events += [made(n, "forward", "mlp:0", site=f"b.py:{n} g") for n in range(1, 21)]

    found = anatomy(events, step=STEP, host_bytes=0)

    row = next(t for t in found.tensors if t.category == "attention")
    assert (row.count, row.total_bytes, row.made_in) == (3, 12, "step/forward/attention")
    assert sum(t.total_bytes for t in found.tensors) + found.unlisted_bytes == found.peak_bytes == 12 + 210
    assert found.unlisted_bytes > 0


def test_the_timeline_keeps_every_local_maximum() -> None:
    """Each rise and fall of the total is a point, with categories that add up."""
    found = anatomy(two_peaks(), step=STEP, host_bytes=0)

    totals = [sum(moment.by_category.values()) for moment in found.timeline]
    assert totals == [10, 60, 10, 55, 10]


def test_a_long_timeline_is_thinned_out_and_keeps_its_peak() -> None:
    """Ten thousand rises and falls give at most a few thousand points, the peak among them."""
    events: list[Event] = []
    for index in range(10_000):
        one = made(99 if index == 6543 else 10 + index % 7, "forward", "mlp:0")
        events += [one, freed(one, "forward")]

    found = anatomy(events, step=STEP, host_bytes=0)

    assert len(found.timeline) <= 3083
    assert max(sum(moment.by_category.values()) for moment in found.timeline) == found.peak_bytes == 99
