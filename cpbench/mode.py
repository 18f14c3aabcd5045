"""Chooses the world of a sweep and says why."""

from __future__ import annotations

from typing import Literal, NamedTuple

from cpbench.case import Device, Mode


class ModeChoice(NamedTuple):
    """The mode and device of every case of a sweep, with the reason in words."""

    mode: Mode
    device: Device
    reason: str


def choose_mode(
    requested: Mode | Literal["auto"], device: Device | None, *, world_size: int, gpus: int
) -> ModeChoice:
    """Return the mode and the device of a sweep.

    Args:
        requested: the mode asked for; `auto` leaves the choice to the machine.
        device: the device asked for, if any.
        world_size: the largest number of ranks on this machine.
        gpus: visible GPUs.
    """
    default: Device = device or ("cuda" if gpus else "cpu")
    if requested == "estimate":
        return ModeChoice("estimate", device or "cuda", "asked for; nothing is allocated on any device")
    if requested != "auto":
        return ModeChoice(requested, default, f"asked for, on {default}")
    if device == "cpu":
        return ModeChoice(
            "measure", "cpu", "device cpu was asked for, so ranks are processes on this machine"
        )
    found = f"{gpus or 'no'} visible GPU{'' if gpus == 1 else 's'}"
    if gpus >= world_size:
        return ModeChoice("measure", "cuda", f"{found} for {world_size} ranks")
    if gpus:
        return ModeChoice(
            "emulate",
            "cuda",
            f"{found} for {world_size} ranks, so one rank runs alone and its communication is modelled; "
            "add --mode estimate to run nothing",
        )
    return ModeChoice(
        "estimate",
        "cuda",
        f"{found} for {world_size} ranks; add --device cpu to measure on CPU processes instead",
    )
