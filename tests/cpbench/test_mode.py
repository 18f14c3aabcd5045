"""The choice of the mode, with its reason."""

from __future__ import annotations

import pytest

from cpbench.case import Device, Mode
from cpbench.mode import choose_mode


@pytest.mark.parametrize(
    ("device", "world_size", "gpus", "expected"),
    [
        (None, 8, 8, ("measure", "cuda")),
        (None, 8, 2, ("emulate", "cuda")),
        ("cuda", 8, 1, ("emulate", "cuda")),
        (None, 8, 0, ("estimate", "cuda")),
        ("cuda", 4, 8, ("measure", "cuda")),
        ("cpu", 8, 0, ("measure", "cpu")),
        ("cpu", 8, 8, ("measure", "cpu")),
    ],
)
def test_auto(device: Device | None, world_size: int, gpus: int, expected: tuple[Mode, Device]) -> None:
    """auto measures if it can, else emulates on a GPU, else estimates; cpu by name means measure."""
    choice = choose_mode("auto", device, world_size=world_size, gpus=gpus)
    assert (choice.mode, choice.device) == expected
    assert choice.reason
    assert choice.mode != "emulate" or "communication is modelled" in choice.reason


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda")])
@pytest.mark.parametrize("mode", ["measure", "emulate"])
def test_a_mode_by_name_is_taken(mode: Mode, gpus: int, device: Device) -> None:
    """A mode that was asked for is never changed; the device is cuda where GPUs are visible."""
    choice = choose_mode(mode, None, world_size=8, gpus=gpus)
    assert (choice.mode, choice.device) == (mode, device)


def test_an_estimate_needs_no_device() -> None:
    """An estimate is the same with and without GPUs."""
    assert choose_mode("estimate", None, world_size=8, gpus=0) == choose_mode(
        "estimate", None, world_size=8, gpus=8
    )
