"""AdamW whose moments live in host memory and are streamed through the device.

The float32 moments of a rank's shards are cut into pieces of at most `PIECE` elements, those of each layer by
themselves: small parameters of a layer share a piece and large ones have several, so a copy is never small and the
device buffers have a fixed size.  `SLOTS` pieces are on the device during a step and none outside it: while one is
updated, the next is on its way in and the last on its way out.  The update itself is torch's fused kernel, so the
results are those of `torch.optim.AdamW(fused=True)`.

Ordering on CUDA, by events only.  A copy in waits for compute, which has been made to wait for the copy out of the
piece that held the slot before.  The update waits for the copy in, and the copy out for the update, so host memory is
overwritten only after it was read.  At the end of a step compute waits for the last copy out; then the slots may be
freed, and the next step may read the host memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cpbench.runtime.host_pool import HostPool, Stored
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.streams import Streams

PIECE = 2**22
"""Elements of a piece; with two float32 moments a slot is 32 MiB, long enough a copy to reach the link's speed."""
SLOTS = 3
"""Pieces on the device at once: one arriving, one being updated, one leaving."""


@dataclass(frozen=True, slots=True)
class Part:
    """Elements `[start, stop)` of a parameter's local shard, flattened."""

    parameter: int
    """Its place among the parameters."""
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """How many there are."""
        return self.stop - self.start


def cut(groups: Sequence[Sequence[int]], limit: int) -> list[list[Part]]:
    """Return pieces that cover shards of the given sizes.

    Args:
        groups: sizes by group; no piece has parts of two groups, so equal groups are cut alike.
        limit: elements of a piece; the last one of a group may have fewer.
    """
    pieces: list[list[Part]] = []
    parameter = 0
    for sizes in groups:
        room = 0
        for size in sizes:
            start = 0
            while start < size:
                if room == 0:
                    pieces.append([])
                    room = limit
                stop = min(start + room, size)
                pieces[-1].append(Part(parameter, start, stop))
                room -= stop - start
                start = stop
            parameter += 1
    return pieces


@dataclass(frozen=True, slots=True)
class Piece:
    """Parts updated together, and where their moments wait."""

    parts: list[Part]
    moments: Stored
    """`[2, elements]`: averages of the gradients, then of their squares."""

    @property
    def shape(self) -> torch.Size:
        """Of the moments."""
        return self.moments.shape


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW for float32 parameters, all with the same settings; `state` holds the step counts alone: no checkpoint."""

    def __init__(
        self,
        groups: Iterable[Sequence[Tensor]],
        pool: HostPool,
        streams: Streams,
        recorder: Recorder,
        *,
        lr: float,
    ) -> None:
        """Take host memory for both moments, 8 bytes an element, and set it to zero.

        Args:
            groups: parameters that may share a piece, for example of one layer; plain or sharded, and their local
                sizes must not change afterwards.
            pool: gives the host memory, which is never returned.
            streams: those that the pool copies on.
            recorder: told which storages hold optimizer states.
            lr: learning rate; all else as torch's defaults.
        """
        given = [list(group) for group in groups if group]
        super().__init__([parameter for group in given for parameter in group], lr=lr, fused=True)
        self._parameters: list[Tensor] = self.param_groups[0]["params"]
        self._streams = streams
        self._recorder = recorder
        device = _local(self._parameters[0]).device
        self._counts: list[Tensor] = []
        for group in given:
            self._counts += torch.zeros(len(group), device=device).unbind()
        for parameter, count in zip(self._parameters, self._counts, strict=True):
            self.state[parameter]["step"] = count
        self._pieces = [
            Piece(parts, pool.zeros((2, sum(part.elements for part in parts)), torch.float32))
            for parts in cut([[_local(parameter).numel() for parameter in group] for group in given], PIECE)
        ]

    def host_memory(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the memory of every piece, with one of the parameters whose moments it holds."""
        for piece in self._pieces:
            yield self._parameters[piece.parts[0].parameter], piece.moments.slab

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure: the loss is computed before
        """Update every parameter that has a gradient."""
        due = [c for c, p in zip(self._counts, self._parameters, strict=True) if p.grad is not None]
        if not due:
            return
        torch._foreach_add_(due, 1)
        slots = self._slots()
        arrived = self._enter(0, slots)
        left: list[torch.cuda.Event | None] = []
        for index, piece in enumerate(self._pieces):
            if index + 1 >= SLOTS:
                self._streams.wait(left[index + 1 - SLOTS])  # its slot is the next piece's
            here, arrived = arrived, self._enter(index + 1, slots)
            self._streams.wait(here)
            moments = _slot(slots, index, piece)
            self._update(piece, moments)
            left.append(self._leave(piece, moments))
        if left:
            self._streams.wait(left[-1])

    def _slots(self) -> Tensor:
        """Device memory for the pieces under way, `[SLOTS, 2 * elements]` float32."""
        elements = max((piece.shape.numel() for piece in self._pieces), default=0)
        slots = torch.empty(
            min(SLOTS, len(self._pieces)), elements, dtype=torch.float32, device=self._counts[0].device
        )
        self._recorder.mark("optimizer", slots)
        return slots

    def _enter(self, index: int, slots: Tensor) -> torch.cuda.Event | None:
        """Start copying a piece in, if there is one."""
        if index >= len(self._pieces):
            return None
        piece = self._pieces[index]
        with self._streams.after_compute("copy_in"):
            _slot(slots, index, piece).copy_(piece.moments.view(), non_blocking=True)
        return self._streams.event("copy_in")

    def _update(self, piece: Piece, moments: Tensor) -> None:
        (group,) = self.param_groups
        columns: tuple[list[Tensor], ...] = ([], [], [], [], [])
        offset = 0
        for part in piece.parts:
            parameter = self._parameters[part.parameter]
            first, offset = offset, offset + part.elements
            if parameter.grad is None:
                continue
            # Taken anew at every step: FSDP2 may put a shard into other storage when the first forward begins.
            row = (
                *(_local(t).view(-1)[part.start : part.stop] for t in (parameter, parameter.grad)),
                *moments[:, first:offset],
                self._counts[part.parameter],
            )
            for column, tensor in zip(columns, row, strict=True):
                column.append(tensor)
        parameters, gradients, averages, squares, counts = columns
        if not parameters:
            return
        torch._fused_adamw_(
            parameters,
            gradients,
            averages,
            squares,
            [],
            counts,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def _leave(self, piece: Piece, moments: Tensor) -> torch.cuda.Event | None:
        """Start copying a piece out."""
        with self._streams.after_compute("copy_out"):
            piece.moments.view().copy_(moments, non_blocking=True)
        return self._streams.event("copy_out")


def _slot(slots: Tensor, index: int, piece: Piece) -> Tensor:
    return slots[index % SLOTS, : piece.shape.numel()].view(piece.shape)


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t.detach()
