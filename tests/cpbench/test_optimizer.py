"""AdamW with its moments in host memory: the same results, less device memory, and no copy out of order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpbench import optimizer, registry
from cpbench.case import STACKS, Case
from cpbench.memory.categories import MemoryNumbers, analyse
from cpbench.memory.cpu_trace import CpuTrace
from cpbench.model_config import ModelConfig
from cpbench.optimizer import OffloadedAdamW, Part, Piece, cut
from cpbench.resolve import resolve
from cpbench.runtime.collectives import Group
from cpbench.runtime.host_pool import HostPool
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.streams import StreamName, Streams
from cpbench.train import TrainStep, World
from cpbench.world.estimate import estimate_case
from tests.cpbench.many_cases import measure

CPU = torch.device("cpu")
LIMIT = 1000
SHAPES = ((7, 11), (1,), (50, 67), (3, 3), (LIMIT,), (13,))  # a part, a share of a piece, several pieces
ELEMENTS = sum(torch.Size(shape).numel() for shape in SHAPES)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "PIECE", LIMIT)


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def offloaded(
    given: list[Tensor], streams: Streams | None = None, kind: type[OffloadedAdamW] = OffloadedAdamW
) -> tuple[OffloadedAdamW, HostPool]:
    streams, recorder = streams or Streams(CPU), Recorder()
    pool = HostPool(CPU, streams, recorder)
    return kind([given[:2], given[2:]], pool, streams, recorder, lr=3e-4), pool


def trained(given: list[Tensor], method: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters after four steps; the fourth of them has no gradient in the second step."""
    generator = torch.Generator().manual_seed(2)
    for step in range(4):
        for index, parameter in enumerate(given):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if (step, index) == (1, 3) else gradient
        method.step()
        method.zero_grad()
    return given


def same(kind: type[OffloadedAdamW]) -> bool:
    ours, theirs = parameters(), parameters()
    trained(ours, offloaded(ours, kind=kind)[0])
    trained(theirs, torch.optim.AdamW(theirs, lr=3e-4, fused=True))
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_pieces_cover_every_element_once() -> None:
    """Small shards share a piece, large ones are cut, empty ones are in none; only a group's last piece is not full."""
    pieces = cut([[3, 0, 10, 4], [], [6, 1]], 5)

    assert pieces == [
        [Part(0, 0, 3), Part(2, 0, 2)],
        [Part(2, 2, 7)],
        [Part(2, 7, 10), Part(3, 0, 2)],
        [Part(3, 2, 4)],
        [Part(4, 0, 5)],
        [Part(4, 5, 6), Part(5, 0, 1)],
    ]
    assert cut([[0, 0], [0]], 5) == []


def test_parameters_are_those_of_adamw_bit_for_bit() -> None:
    """Over four steps, with a parameter that once has no gradient, nothing differs from torch's own AdamW."""
    assert same(OffloadedAdamW)


class NeverLeaves(OffloadedAdamW):
    def _leave(self, piece: Piece, moments: Tensor) -> None:
        pass


class WrongSlot(OffloadedAdamW):
    def _leave(self, piece: Piece, moments: Tensor) -> None:
        piece.moments.view().copy_(moments.roll(1, 1))


class CountsPieces(OffloadedAdamW):
    def _update(self, piece: Piece, moments: Tensor) -> None:
        super()._update(piece, moments)
        if len(piece.parts) == 1:
            self._counts[piece.parts[0].parameter] += 1


@pytest.mark.parametrize("fault", [NeverLeaves, WrongSlot, CountsPieces])
def test_faults_in_the_streaming_change_the_parameters(fault: type[OffloadedAdamW]) -> None:
    """The twin: moments not written back, written elsewhere, or a step counted twice are all found."""
    assert not same(fault)


def test_host_bytes_are_exact() -> None:
    """Two float32 moments an element, from the start, and no more however many steps run."""
    given = parameters()
    method, pool = offloaded(given)
    assert pool.peak_bytes == 8 * ELEMENTS

    trained(given, method)

    assert pool.peak_bytes == 8 * ELEMENTS


def test_a_rank_without_elements_steps_too() -> None:
    """More ranks than rows leave some ranks with empty shards only."""
    empty = torch.nn.Parameter(torch.empty(0, 4))
    method, pool = offloaded([empty])
    empty.grad = torch.empty(0, 4)

    method.step()

    assert pool.peak_bytes == 0


# Order on CUDA, checked without one: every access gets a vector clock, as a race detector would give it.


Event = tuple[str, dict[str, int]]
"""The stream that recorded it, and what has ended once it has."""


@dataclass(frozen=True)
class Access:
    stream: str
    time: int
    seen: dict[str, int]
    """The last time of each stream that had ended for certain."""
    start: int
    stop: int
    writes: bool
    operator: str


class ClockedStreams(Streams):
    """Streams of a CUDA device as far as ordering goes."""

    def __init__(self, deaf_to: StreamName | None = None) -> None:
        super().__init__(CPU)
        self.current = "compute"
        self.clocks: dict[str, dict[str, int]] = {"compute": {}, "copy_in": {}, "copy_out": {}}
        self.deaf_to = deaf_to

    def tick(self) -> tuple[str, int, dict[str, int]]:
        clock = self.clocks[self.current]
        clock[self.current] = clock.get(self.current, 0) + 1
        return self.current, clock[self.current], dict(clock)

    @contextmanager
    def after_compute(self, name: StreamName) -> Iterator[None]:
        self._join(name, self.clocks["compute"])
        self.current = name
        yield
        self.current = "compute"

    def event(self, name: StreamName) -> Event:
        return name, dict(self.clocks[name])

    def wait(self, event: Event | None) -> None:
        if event is not None and event[0] != self.deaf_to:
            self._join("compute", event[1])

    def _join(self, name: str, other: dict[str, int]) -> None:
        clock = self.clocks[name]
        for stream, time in other.items():
            clock[stream] = max(clock.get(stream, 0), time)


class Accesses(TorchDispatchMode):
    """Notes which bytes every operator reads and writes, and on which stream."""

    def __init__(self, streams: ClockedStreams) -> None:
        super().__init__()
        self.streams = streams
        self.found: list[Access] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            stream, time, seen = self.streams.tick()
            for argument, value in zip(func._schema.arguments, args, strict=False):
                writes = argument.alias_info is not None and argument.alias_info.is_write
                for t in tree_leaves(value):
                    if isinstance(t, Tensor):
                        start = t.data_ptr()
                        stop = start + t.numel() * t.element_size()
                        self.found.append(Access(stream, time, seen, start, stop, writes, str(func)))
        return result

    def races(self) -> list[str]:
        """Pairs of accesses to the same bytes, one of them a write, that nothing puts in order."""
        return [
            f"{a.operator} on {a.stream} and {b.operator} on {b.stream}"
            for index, b in enumerate(self.found)
            for a in self.found[:index]
            if (a.writes or b.writes)
            and a.start < b.stop
            and b.start < a.stop
            and b.seen.get(a.stream, 0) < a.time
        ]


def accesses(streams: ClockedStreams) -> Accesses:
    """Three steps, after each of which compute overwrites the freed slots, as a later allocation would."""
    given = parameters()
    kept: list[Tensor] = []

    class Keeping(OffloadedAdamW):
        def _slots(self) -> Tensor:
            # One block for all steps: what an allocator does that gives freed memory out again.
            kept.append(kept[0] if kept else super()._slots())
            return kept[0]

    method, _ = offloaded(given, streams, Keeping)
    for parameter in given:
        parameter.grad = torch.ones_like(parameter)
    with Accesses(streams) as found:
        for _ in range(3):
            method.step()
            kept[0].zero_()
    assert {access.stream for access in found.found} == {"compute", "copy_in", "copy_out"}
    return found


def test_nothing_is_read_or_overwritten_out_of_order() -> None:
    """Slots and host memory are touched only after what used them before, also by who gets the slots' memory next."""
    assert accesses(ClockedStreams()).races() == []


@pytest.mark.parametrize("deaf_to", ["copy_in", "copy_out"])
def test_a_missing_wait_is_a_race(deaf_to: StreamName) -> None:
    """The twin: without waiting for copies in, or for copies out, the detector finds races."""
    assert accesses(ClockedStreams(deaf_to)).races()


def test_a_slot_is_waited_for_as_soon_as_it_is_used_again() -> None:
    """Copies in and out overlap: a copy in waits for no copy out but the one that frees its slot."""
    found = accesses(ClockedStreams()).found
    ins = [a for a in found if a.stream == "copy_in" and a.writes]
    outs = [a for a in found if a.stream == "copy_out" and a.writes]
    pieces = len(ins) // 3
    assert pieces > 4

    for index in range(3, pieces):
        assert ins[index].seen["copy_out"] == outs[index - 3].time
    assert outs[0].seen["copy_in"] < ins[2].time


# The whole training step.

CONFIG = ModelConfig(
    hidden_dim=64, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=16, ffn_dim=136, vocab_size=251
)
PARAMETERS = 2 * 9 + 3


def case(
    *,
    offload: bool,
    mode: str = "measure",
    stack: str = "checkpoint",
    method: str = "single",
    seq_len: int = 32,
    world_size: int = 1,
) -> Case:
    requested = Case.model_validate(
        {
            "method": method,
            "model": "small",
            "architecture": CONFIG,
            "seq_len": seq_len,
            "world_size": world_size,
            "dtype": "float32",
            "stack": STACKS[stack].model_copy(update={"optimizer_offload": offload}),
            "mode": mode,
        }
    )
    resolved, unsupported = resolve(requested, [])
    assert unsupported is None
    return resolved


@contextmanager
def alone() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        one = Group(size=1, rank=0)
        yield World(rank=0, mesh=init_device_mesh("cpu", (1,)), ulysses=one, ring=one, device=CPU)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def world() -> Iterator[World]:
    with alone() as world:
        yield world


def step_of(c: Case, world: World, recorder: Recorder | None = None) -> TrainStep:
    return TrainStep(c, registry.load(c.method, c.options), world, recorder or Recorder())


def measured(c: Case, world: World) -> tuple[MemoryNumbers, TrainStep]:
    recorder = Recorder()
    trace = CpuTrace(recorder)
    trace.start()
    step = step_of(c, world, recorder)
    for index in range(2):
        with recorder.scope(f"step:{index}"):
            step.run(index)
    return analyse(trace.stop(), step="step:1"), step


@pytest.mark.parametrize("stack", ["plain", "long"])
def test_the_model_trains_the_same(world: World, stack: str) -> None:
    """Three steps with and without offload give the same parameters, losses and norms to the bit."""
    steps = [step_of(case(offload=offload, stack=stack), world) for offload in (False, True)]
    results = [[step.run(index) for index in range(3)] for step in steps]

    assert isinstance(steps[1].optimizer, OffloadedAdamW)
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs.loss, ours.loss)
        assert torch.equal(theirs.grad_norm, ours.grad_norm)
    for theirs, ours in zip(*(step.model.parameters() for step in steps), strict=True):
        assert torch.equal(theirs.to_local(), ours.to_local())


def test_the_optimizer_phase_needs_both_moments_less(world: World) -> None:
    """The peak falls by two float32 moments less the slots; the host holds exactly the moments."""
    kept, plain = measured(case(offload=False), world)
    streamed, offload = measured(case(offload=True), world)

    slots = 3 * 2 * LIMIT * 4
    moments = 8 * CONFIG.num_params
    saved = kept.by_phase["optimizer"] - streamed.by_phase["optimizer"]
    # With the moments there, the peak is while gradients are clipped, which takes two numbers a parameter.
    assert 0 <= saved - (moments - slots) <= 2 * 4 * PARAMETERS
    assert kept.by_phase["forward"] - streamed.by_phase["forward"] == moments
    assert plain.host_pool.peak_bytes == 0
    assert offload.host_pool.peak_bytes == moments
    for numbers in (kept, streamed):
        assert sum(numbers.by_category.values()) == numbers.peak_bytes


def test_slots_count_as_optimizer_memory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a peak in the optimizer, the category holds three slots, as large as a layer, step counts and the norm."""
    monkeypatch.setattr(optimizer, "PIECE", 2**16)
    ends = 251 * 64
    layer = (CONFIG.num_params - 2 * ends - 64) // CONFIG.num_layers
    assert ends < layer <= 2**16

    numbers, _ = measured(case(offload=True), world)

    assert numbers.peak_bytes == numbers.by_phase["optimizer"]
    assert numbers.by_category["optimizer"] == 3 * 2 * layer * 4 + 4 * (PARAMETERS + 1)


@pytest.mark.parametrize("offload", [False, True])
def test_the_estimate_equals_the_measurement(offload: bool) -> None:
    """Peak, phases and host bytes of an estimate are those of the trace within 1 %."""
    with alone() as world:
        numbers, step = measured(case(offload=offload), world)
    c = case(offload=offload, mode="estimate")
    estimated = estimate_case(c, registry.load(c.method, c.options)).ranks[0].memory

    assert estimated.host_pinned_peak_bytes == step.host_pool.peak_bytes
    assert abs((estimated.peak_allocated_bytes or 0) - numbers.peak_bytes) <= 0.01 * numbers.peak_bytes
    # Of a step without streaming, fake tensors show no allocation in the optimizer.
    for phase in ("forward", "backward", "optimizer") if offload else ("forward", "backward"):
        wanted = numbers.by_phase[phase]
        assert abs(estimated.peak_by_phase_bytes[phase] - wanted) <= 0.01 * wanted, phase


@pytest.mark.slow
def test_real_ranks_train_the_same_with_the_option(tmp_path: Path) -> None:
    """Two processes: the same losses and norms with and without, exact host bytes, categories that add up."""
    cases = [
        case(offload=offload, stack="long", method="ulysses", seq_len=64, world_size=2)
        for offload in (False, True)
    ]
    plain, offload = measure(cases, tmp_path)

    inputs = 2 * 32 * 64 * 4
    moments = 0
    for theirs, ours in zip(plain, offload, strict=True):
        assert len(ours.losses) == 2
        assert (theirs.losses, theirs.grad_norms) == (ours.losses, ours.grad_norms)
        assert theirs.memory.host_pinned_peak_bytes == inputs
        moments += (ours.memory.host_pinned_peak_bytes or 0) - inputs
        assert sum(ours.memory.peak_by_category_bytes.values()) == ours.memory.peak_allocated_bytes
    assert moments == 8 * CONFIG.num_params
