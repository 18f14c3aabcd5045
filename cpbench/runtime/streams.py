"""The side streams of a step: copies to and from the host beside compute.  On CPU every call does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch

StreamName = Literal["copy_out", "copy_in"]


class Streams:
    """One CUDA stream a purpose; ordering between streams is by events, never by `record_stream`."""

    def __init__(self, device: torch.device) -> None:
        self._streams: dict[StreamName, torch.cuda.Stream] = {}
        if device.type == "cuda":
            self._streams = {"copy_out": torch.cuda.Stream(device), "copy_in": torch.cuda.Stream(device)}

    @contextmanager
    def after_compute(self, name: StreamName) -> Iterator[None]:
        """Run what is inside on a side stream, after all compute queued so far."""
        stream = self._streams.get(name)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            yield

    def event(self, name: StreamName) -> torch.cuda.Event | None:
        """Return an event after all work queued on a side stream so far."""
        stream = self._streams.get(name)
        return stream.record_event() if stream is not None else None

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Make the current stream (compute, unless inside `after_compute`) wait for an event."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
