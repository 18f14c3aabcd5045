"""Times single operations on one GPU and holds them against the time model's rates for it.

    python -m cpbench.timing.probe_rates --hardware h100-80g --out rates.json

Each probe is an operation of a step of llama3-8b: matrix products, both passes of each attention kernel, an elementwise
kernel, copies to the host and back (alone and both at once), page-locking, and the shortest kernel.  For attention it
also says what the allocator gave the kernel inside, beside what estimates count (`scratch_of`).  The results are
measured; nothing is changed by them: a profile takes its values by hand, with a source.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cpbench.case import AttentionBackend
from cpbench.errors import CpbenchError
from cpbench.hardware import Rates, load_hardware
from cpbench.rate_probe import RateProbe, RateProbes
from cpbench.runtime.kernels import Kernels, scratch_of
from cpbench.runtime.page_locked import page_locked
from cpbench.timing.clock import Clock
from cpbench.timing.operation import Operation, Work
from cpbench.timing.rates import seconds
from cpbench.units import format_bytes

_HIDDEN, _FFN, _HEADS, _KV_HEADS, _WIDTH = 4096, 14336, 32, 8, 128
_BACKENDS: dict[str, tuple[AttentionBackend, ...]] = {"cuda": ("cuda-flash", "cudnn"), "cpu": ("cpu-flash",)}
_REPEATS = 5
_LARGEST_SCALE = 64
"""Beyond it, the shortest probes would have no tokens to speak of."""


@dataclass(frozen=True, slots=True)
class Prober:
    """Where and how large."""

    device: torch.device
    rates: Rates | None
    """Of the profile to compare with."""
    scale: int = 1
    """Divides all sizes; above 1 only for a try without a GPU."""

    def all(self) -> Iterator[RateProbe]:
        """Yield every probe; each leaves the device empty."""
        yield from self.products()
        yield from self.attention()
        yield from self.elementwise()
        yield from self.copies()

    def products(self) -> Iterator[RateProbe]:
        """Matrix products of 16 Ki tokens with the weights of a layer."""
        tokens = 16384 // self.scale
        hidden, ffn = _HIDDEN // self.scale, _FFN // self.scale
        for rows, columns in ((hidden, hidden), (hidden, ffn), (ffn, hidden)):
            x, w = self._draw(tokens, rows), self._draw(rows, columns)
            flops, size = 2 * tokens * rows * columns, 2 * (x.numel() + w.numel() + tokens * columns)
            yield self._probe(
                "matmul",
                f"{tokens} x {rows} x {columns}",
                lambda x=x, w=w: x @ w,  # type: ignore[misc]  # a default binds the loop's value
                "matmul",
                flops=flops,
                size=size,
            )

    def attention(self) -> Iterator[RateProbe]:
        """Both passes of every kernel, causal, over lengths at which all multiprocessors are busy."""
        for backend in _BACKENDS[self.device.type]:
            for tokens in (2048, 4096, 8192, 16384, 32768):
                yield from self._attention(backend, tokens // self.scale, tokens // self.scale)
            # A ring's or FPDT's block of earlier keys is not causal; heads and lengths of a late UPipe stage.
            yield from self._attention(backend, 8192 // self.scale, 16384 // self.scale)
            yield from self._attention(backend, 65536 // self.scale, 65536 // self.scale, heads=4, kv_heads=1)

    def elementwise(self) -> Iterator[RateProbe]:
        """A copy on the device, far larger than any cache, and many kernels of nothing."""
        source = self._draw(2**30 // self.scale**2)
        target = torch.empty_like(source)
        size = 2 * source.nbytes
        yield self._probe(
            "copy on device",
            format_bytes(source.nbytes),
            lambda: target.copy_(source),
            "memory",
            size=size,
        )
        one = torch.ones(1, device=self.device)

        def many() -> None:
            for _ in range(1000):
                one.add_(1)

        found = self._probe("kernel of one element", "one of 1000", many, None)
        modelled = None if self.rates is None else self.rates.kernel_seconds
        yield RateProbe(
            name=found.name, shape=found.shape, seconds=found.seconds / 1000, modelled_seconds=modelled
        )

    def copies(self) -> Iterator[RateProbe]:
        """Copies of 1 GiB between the device and page-locked memory, and the locking."""
        size = 2**30 // self.scale**2
        there = torch.empty(size, dtype=torch.uint8, device=self.device)
        other = torch.empty_like(there)
        if self.device.type != "cuda":
            return
        locked, blocks = [], []
        for _ in range(2):
            clock = Clock(torch.device("cpu"))
            clock.mark()
            blocks.append(page_locked(size))
            clock.mark()
            locked += clock.durations()
        host, second = blocks
        yield RateProbe(
            name="page-lock", shape=format_bytes(size), seconds=statistics.median(locked), bytes=size
        )
        for name, run in (
            ("copy_out", lambda: host.copy_(there, non_blocking=True)),
            ("copy_in", lambda: there.copy_(host, non_blocking=True)),
        ):
            yield self._probe(name, format_bytes(size), run, "copy", size=size)
        side = torch.cuda.Stream()

        def both() -> None:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                second.copy_(other, non_blocking=True)
            there.copy_(host, non_blocking=True)
            torch.cuda.current_stream().wait_stream(side)

        yield self._probe("copies both ways at once", f"{format_bytes(size)} each", both, None, size=2 * size)

    def _attention(
        self,
        backend: AttentionBackend,
        queries: int,
        keys: int,
        heads: int = _HEADS,
        kv_heads: int = _KV_HEADS,
    ) -> Iterator[RateProbe]:
        kernels, causal, scale = Kernels(backend), queries == keys, _WIDTH**-0.5
        q, k, v = (
            self._draw(1, n, h, _WIDTH) for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
        )
        words = f"{backend}, {heads}/{kv_heads} heads, {queries} x {keys}{' causal' if causal else ''}"
        shape = (1, queries, keys, heads, _WIDTH)
        square = heads * queries * keys * _WIDTH * (1 if causal else 2)

        def forward() -> tuple[Tensor, Tensor]:
            return kernels.forward(q, k, v, causal=causal, scale=scale)

        def inner(backward: bool) -> int:
            return scratch_of(backend, q.shape, k.shape, q.element_size(), backward=backward)

        yield self._probe(
            "attention_forward",
            words,
            forward,
            "attention",
            flops=2 * square,
            shape=shape,
            kernel=backend,
            inner=inner(False),
        )
        out, lse = forward()
        dout = torch.randn_like(out)

        def backward() -> tuple[Tensor, Tensor, Tensor]:
            return kernels.backward(dout, q, k, v, out, lse, causal=causal, scale=scale)

        yield self._probe(
            "attention_backward",
            words,
            backward,
            "attention",
            flops=5 * square,
            shape=shape,
            kernel=backend,
            inner=inner(True),
        )

    def _draw(self, *shape: int) -> Tensor:
        """Random values: on zeros a GPU can be faster."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return torch.randn(shape, device=self.device, dtype=dtype)

    def _probe(
        self,
        name: str,
        words: str,
        run: Callable[[], object],
        work: Work | None,
        *,
        flops: int = 0,
        size: int = 0,
        shape: tuple[int, ...] = (),
        kernel: str = "",
        inner: int | None = None,
    ) -> RateProbe:
        taken = self._taken(run) if inner is not None else None  # and warms up
        run()
        clock = Clock(self.device)
        for _ in range(_REPEATS):
            clock.mark()
            run()
        clock.mark()
        modelled = None
        if work is not None and self.rates is not None:
            operation = Operation(name, work, "compute", (), flops=flops, size=size, shape=shape)
            modelled = seconds(operation, self.rates, kernel)
        return RateProbe(
            name=name,
            shape=words,
            seconds=statistics.median(clock.durations()),
            modelled_seconds=modelled,
            flops=flops,
            bytes=0 if flops else size,
            inner_bytes=taken,
            stated_inner_bytes=inner if taken is not None else None,
        )

    def _taken(self, run: Callable[[], object]) -> int | None:
        """Bytes that the allocator gave at most during an operation, beside its results."""
        if self.device.type != "cuda":
            return None
        run()  # a library's workspace is made once and stays
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        made = run()
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated()
        del made
        return torch.cuda.max_memory_allocated() - kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every probe, print a line for each and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cpbench.timing.probe_rates")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--hardware", default="h100-80g", help="profile to compare with")
    parser.add_argument("--scale", type=int, default=1, help="divides all sizes, for a try without a GPU")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if not 1 <= given.scale <= _LARGEST_SCALE:
        parser.error(f"--scale {given.scale} is not a number from 1 to {_LARGEST_SCALE}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --scale 32 tries the probes without one")
    try:
        rates = load_hardware(given.hardware).rates if given.device == "cuda" else None
    except CpbenchError as error:
        parser.error(str(error))
    probes: list[RateProbe] = []
    for probe in Prober(torch.device(given.device), rates, given.scale).all():
        probes.append(probe)
        sys.stdout.write(f"{probe.line}\n")
        sys.stdout.flush()
        if given.out is not None:  # after each, so that a time limit loses nothing
            given.out.write_text(RateProbes.dump_json(probes, indent=1).decode(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
