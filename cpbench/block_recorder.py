"""Records one attention block in a real run: what ran, in which lane, and what was alive meanwhile.

    torchrun ... -m cpbench.block_recorder job.json

The job has the keys of `cpbench.worker`, and `cases`, each with a world of all ranks or of one.  The block runs as in a
checkpointed stack: a first forward of which nothing but its memo survives, the recomputation, then the backward.

Bytes are those of the CPU allocator (`cpbench.memory.cpu_trace`), without the workspaces that the CPU's GEMMs and its
attention kernel take inside, which say nothing about a GPU's; the peaks of `costs` are stated without them too.  Names
come from watching the operators: what an operator makes is named by what it computed and from what
(`cpbench.block_names`), and marked in the trace.  The host pool keeps the sources of copies as long as on CUDA.  Tiles
of fixed size are made as small against these tensors as they are against those of a longer sequence.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from cpbench import registry
from cpbench.block_log import BlockLog, Operation, slots
from cpbench.block_names import NameOperators
from cpbench.block_schedule import BlockSchedule, BlockSchedules, PhaseName, Sent
from cpbench.case import Case
from cpbench.memory.cpu_trace import CpuTrace
from cpbench.method import AttentionWeights, Method
from cpbench.model.tiling import TILES
from cpbench.parity.ranks import Ranks
from cpbench.runtime.collectives import CollectiveLog, CountCollectives
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.costs import HeadBytes
from cpbench.runtime.host_pool import HostPool, Stored
from cpbench.runtime.kernels import select_kernels
from cpbench.runtime.memo import Memo
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.rope import Rope
from cpbench.runtime.streams import StreamName, Streams
from cpbench.train import DTYPES, World
from cpbench.worker import leave, run_rank
from cpbench.world.emulate import emulated_world

_LONG_ELEMENTS = 2**26
"""Elements of a tensor of all query heads of a rank that has 16 Ki tokens, 4096 wide."""


def record_block(case: Case, method: Method, given: Case, ranks: Ranks) -> BlockSchedule:
    """Run a block of a case on all its ranks at once and return its schedule on the rank that needed most.

    Args:
        case: resolved.
        method: of the case.
        given: the case as asked for.
        ranks: all or one; every one of them must call this.
    """
    mine = _Run(case, method, ranks.world(method.layout(case, ranks.rank))).record(given.options)
    found: list[str] = [mine.model_dump_json()] * ranks.size
    if ranks.size > 1:
        dist.all_gather_object(found, found[0])
    return _neediest(BlockSchedule.model_validate_json(text) for text in found)


def emulate_ranks(given: Case, plugins: Sequence[Path]) -> list[BlockSchedule]:
    """Run a block of a case as each of its ranks in turn, alone, and return the schedules of all.

    Args:
        given: the case as asked for, with mode emulate.
        plugins: files of further methods.

    Raises:
        Unsupported: the method would refuse the case on CUDA too.
    """
    case, method = _ready(given, plugins)
    found = []
    for rank in range(case.world_size):
        with emulated_world(case, method.layout(case, rank), rank) as world:
            found.append(_Run(case, method, world).record(given.options))
    return found


def _neediest(schedules: Iterable[BlockSchedule]) -> BlockSchedule:
    """The one with the higher of its two peaks the highest, then the other, then the first rank."""

    def need(s: BlockSchedule) -> tuple[int, int, int]:
        smaller, larger = sorted((s.forward_peak_bytes, s.backward_peak_bytes))
        return larger, smaller, -s.rank

    return max(schedules, key=need)


class _Run:
    """One block on one rank."""

    def __init__(self, case: Case, method: Method, world: World) -> None:
        self.case, self.method, self.rank = case, method, world.rank
        self.recorder, self.log = Recorder(), BlockLog()
        self.names = NameOperators(self.recorder, self.log, wide=DTYPES[case.dtype] is not torch.float32)
        self.sent: dict[PhaseName, CollectiveLog] = {}
        streams = _LoggedStreams(world.device, self.log)
        pool = _LoggedPool(world.device, streams, self.recorder, asynchronous=True)
        pool.log = self.log
        self.ctx = AttentionContext(
            case=case,
            ulysses=world.ulysses,
            ring=world.ring,
            kernels=select_kernels(case),
            rope=Rope(method.layout(case, world.rank).segments, case.architecture.rope_theta),
            recorder=self.recorder,
            host=pool,
            parts_tile=_smaller(TILES.parts, case),
        )

    def record(self, given: dict[str, Any]) -> BlockSchedule:
        """Run and return the schedule of this rank."""
        trace = CpuTrace(self.recorder)
        with _small_tiles(self.case), _logged_collectives(self.log, self.names.name_of):
            leaves = self._leaves()
            trace.start()
            self._steps(leaves)
            timeline = trace.stop()
        case, a = self.case, self.case.architecture
        with _no_scratch():
            # The host pool here keeps sources as on CUDA.  A method that runs there alone has terms for the copies that
            # CUDA's operators make, and none of those ran here.
            device = "cpu" if case.mode == "emulate" else "cuda"
            costs = self.method.costs(case.model_copy(update={"device": device}))
        drawn = slots(self.log, timeline)
        return BlockSchedule(
            method=case.method,
            options=case.options,
            given=given,
            emulated=case.mode == "emulate",
            world_size=case.world_size,
            rank=self.rank,
            seq_len=case.seq_len,
            num_heads=a.num_heads,
            num_kv_heads=a.num_kv_heads,
            head_dim=a.head_dim,
            hidden_dim=a.hidden_dim,
            dtype=case.dtype,
            torch=torch.__version__,
            unit_bytes=HeadBytes.of(case, tokens=case.tokens_per_rank).q,
            bars=drawn.bars,
            phases=drawn.phases,
            alive=drawn.alive,
            host=drawn.host,
            forward_peak_bytes=drawn.peak("forward"),
            backward_peak_bytes=max(drawn.peak("recomputation"), drawn.peak("backward")),
            stated_forward_peak_bytes=costs.forward_peak_bytes,
            stated_backward_peak_bytes=costs.backward_peak_bytes,
            sent={
                phase: tuple(Sent(kind=kind, bytes=size) for kind, size in log.sequence)
                for phase, log in self.sent.items()
            },
            stated_sent={
                "forward": costs.forward_collective_bytes,
                "backward": costs.backward_collective_bytes,
            },
        )

    def _steps(self, leaves: dict[str, Tensor]) -> None:
        dy = torch.ones_like(leaves["x"], requires_grad=False)
        for name, t in (*leaves.items(), ("dy", dy)):
            self.names.name(t, name)
        memo = Memo(self.ctx.host)
        ctx = replace(self.ctx, memo=memo)
        with self.names:
            with self._phase("forward"), torch.no_grad():
                self._attention(leaves, ctx)
            memo.recomputing = True
            with self._phase("recomputation"):
                y = self._attention(leaves, ctx)
            edge = torch.autograd.graph.get_gradient_edge(y)
            del y
            with self._phase("backward"):
                torch.autograd.grad([edge], list(leaves.values()), [dy])

    @contextmanager
    def _phase(self, name: PhaseName) -> Iterator[None]:
        self.log.phases[name] = self.log.count
        self.sent[name] = CollectiveLog()
        with CountCollectives(self.sent[name]):
            yield

    def _attention(self, leaves: dict[str, Tensor], ctx: AttentionContext) -> Tensor:
        weights = AttentionWeights(**{name: t for name, t in leaves.items() if name != "x"})
        y = self.method.attention(leaves["x"], weights, ctx)
        self.names.name(y, "y")
        return y

    def _leaves(self) -> dict[str, Tensor]:
        a, dtype = self.case.architecture, DTYPES[self.case.dtype]
        rows = (self.case.batch_size, self.case.tokens_per_rank, a.hidden_dim)
        shapes: dict[str, tuple[int, ...]] = {"x": rows} | a.attention_shapes()
        generator = torch.Generator().manual_seed(self.case.seed)
        made = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
        return {name: t.to(dtype).requires_grad_() for name, t in made.items()}


class _LoggedStreams(Streams):
    """Side streams that run nothing beside anything, but say what they would."""

    def __init__(self, device: torch.device, log: BlockLog) -> None:
        super().__init__(device)
        self._log = log

    @contextmanager
    def after_compute(self, name: StreamName) -> Iterator[None]:
        """Note which stream a copy is for."""
        self._log.stream = name
        try:
            yield
        finally:
            self._log.stream = None

    def event(self, name: StreamName) -> torch.cuda.Event | None:
        """Return the copy that was started last, in the place of an event."""
        copies = [operation for operation in self._log.operations if operation.lane == name]
        return cast("torch.cuda.Event", copies[-1])

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Note that compute waits for a copy."""
        copy = cast("Operation | None", event)
        if copy is not None and copy.done is None:
            copy.done = self._log.count


class _LoggedPool(HostPool):
    """A host pool that says how much of it is in use."""

    log: BlockLog

    def store(self, t: Tensor) -> Stored:
        """Store, and count."""
        stored = super().store(t)
        self.log.host.append((self.log.count, stored.slab.numel()))
        return stored

    def drop(self, stored: Stored) -> None:
        """Drop, and count."""
        super().drop(stored)
        self.log.host.append((self.log.count, -stored.slab.numel()))


@contextmanager
def _logged_collectives(log: BlockLog, name_of: Callable[[Tensor], str]) -> Iterator[None]:
    """Note when each collective of a method starts and when it is waited for."""
    exchange, hop = dist.all_to_all_single, dist.batch_isend_irecv

    def all_to_all_single(output: Tensor, source: Tensor, **rest: Any) -> Any:  # noqa: ANN401 - torch's own signature
        operation = log.add("communication", "all_to_all", name_of(source))
        work = exchange(output, source, **rest)
        return None if work is None else _Waited([work], operation, log)

    def batch_isend_irecv(operations: Sequence[dist.P2POp]) -> Any:  # noqa: ANN401 - torch's own signature
        names = [name_of(op.tensor).removesuffix(" float32") for op in operations if op.op is dist.isend]
        operation = log.add("communication", "send", ", ".join(names))
        return [_Waited(hop(list(operations)), operation, log)]

    with (
        patch.object(dist, "all_to_all_single", all_to_all_single),
        patch.object(dist, "batch_isend_irecv", batch_isend_irecv),
    ):
        yield


@dataclass(frozen=True, slots=True)
class _Waited:
    """Collectives that were started together."""

    works: Sequence[Any]
    operation: Operation
    log: BlockLog

    def wait(self) -> None:
        """Wait for all, and note it."""
        for work in self.works:
            work.wait()
        self.operation.done = self.log.count


@contextmanager
def _small_tiles(case: Case) -> Iterator[None]:
    """Tiles as small against the tensors of this case as they are against long ones."""
    with ExitStack() as stack:
        for module in list(sys.modules.values()):
            size = getattr(module, "_TILE_ELEMENTS", None)
            if isinstance(size, int):
                stack.enter_context(patch.object(module, "_TILE_ELEMENTS", _smaller(size, case)))
        yield


def _smaller(size: int, case: Case) -> int:
    elements = case.tokens_per_rank * case.architecture.attention_dim * case.batch_size
    return max(1, size * elements // _LONG_ELEMENTS)


@contextmanager
def _no_scratch() -> Iterator[None]:
    """Costs without what the attention kernel takes inside, which on CPU says nothing about a GPU."""
    with ExitStack() as stack:
        for module in list(sys.modules.values()):
            if callable(getattr(module, "scratch_of", None)):
                stack.enter_context(patch.object(module, "scratch_of", lambda *_, **__: 0))
        yield


def record(cases: Sequence[Case], plugins: Sequence[Path]) -> BlockSchedules:
    """Record a block of each case; a case of one rank runs on rank 0, emulated ones in this process alone."""
    torch.set_num_threads(1)  # the scratch of the CPU kernel depends on it
    if all(case.mode == "emulate" for case in cases):
        return BlockSchedules(schedules=tuple(_neediest(emulate_ranks(given, plugins)) for given in cases))
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    try:
        everyone, alone = Ranks.make(torch.device("cpu"))
        found = []
        for given in cases:
            case, method = _ready(given, plugins)
            ranks = alone if case.world_size == 1 else everyone
            if ranks is everyone or dist.get_rank() == 0:
                found.append(record_block(case, method, given, ranks))
        return BlockSchedules(schedules=tuple(found))
    finally:
        dist.destroy_process_group()


def _ready(given: Case, plugins: Sequence[Path]) -> tuple[Case, Method]:
    """The resolved case and its method.

    What is emulated here is a method that refuses CPU, so it is asked whether it would run the case on CUDA.
    """
    method = registry.load(given.method, given.options, plugins)
    case = given.model_copy(update={"options": registry.resolved_options(method)})
    method.check(case.model_copy(update={"device": "cuda"}) if case.mode == "emulate" else case)
    return case, method


def main(job_file: str) -> int:
    """Run the job of this rank; return the exit code."""
    job: dict[str, Any] = json.loads(Path(job_file).read_text(encoding="utf-8"))
    cases = [Case.model_validate(raw) for raw in job["cases"]]
    plugins = [Path(path) for path in job["plugins"]]
    return run_rank(Path(job["scratch"]), Path(job["log_dir"]), lambda: record(cases, plugins))


if __name__ == "__main__":
    leave(main(sys.argv[1]))
