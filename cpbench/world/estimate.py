"""The world without devices: one rank of W over fake tensors and a fake process group, its memory counted.

The same training step runs as in the measured world, once, after the optimizer states are made.  Tile loops run only
the tiles that differ (`cpbench.runtime.tiles`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.machine import usable_cpus
from cpbench.memory.categories import MemoryNumbers, analyse
from cpbench.memory.fake_trace import FakeTrace
from cpbench.method import Method
from cpbench.record import Memory, RankReport, Software, WorkerReport
from cpbench.runtime.collectives import CollectiveLog, CountCollectives
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.tiles import sampled_tiles
from cpbench.train import TrainStep, World
from cpbench.world.measure import parallel_groups


def estimate_case(case: Case, method: Method, *, rank: int = 0) -> WorkerReport:
    """Return what one rank of a case would use.

    Args:
        case: resolved, with mode estimate.
        method: of the case.
        rank: the rank to run.

    Raises:
        Unsupported: the attention backend's inner memory is not known.
    """
    if case.attention_backend == "cudnn":
        raise Unsupported(
            'the estimate does not know cuDNN\'s workspace; set attention_backend = "auto" in [run] of the scenario'
        )
    recorder, log = Recorder(), CollectiveLog()
    with _threads(case), _fake_world(case, method, rank) as world, FakeTensorMode(), sampled_tiles():
        trace = FakeTrace(recorder)
        with trace:
            step = TrainStep(case, method, world, recorder)
            with recorder.scope("step:0"):
                step.make_optimizer_states()
            with recorder.scope("step:1"), CountCollectives(log):
                step.run(1)
            numbers = analyse(trace.timeline, step="step:1")
    if log.unknown:
        raise RuntimeError(f"collectives that are not counted: {', '.join(sorted(set(log.unknown)))}")
    report = RankReport(
        rank=rank,
        memory=_memory(numbers, step.host_pool.peak_bytes),
        samples=(),
        losses=(),
        grad_norms=(),
        collective_bytes=log.bytes,
        collective_calls=log.calls,
        attention_backend=step.kernels.name,
    )
    return WorkerReport(ranks=(report,), software=Software(torch=torch.__version__))


@contextmanager
def _threads(case: Case) -> Iterator[None]:
    """The threads a rank would have: a CPU kernel's scratch depends on them."""
    before = torch.get_num_threads()
    if case.device == "cpu":
        torch.set_num_threads(max(1, usable_cpus() // case.world_size))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _fake_world(case: Case, method: Method, rank: int) -> Iterator[World]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=case.world_size)
    try:
        mesh = init_device_mesh("cpu", (case.world_size,))
        ulysses, ring = parallel_groups(rank, method.layout(case, rank))
        yield World(rank=rank, mesh=mesh, ulysses=ulysses, ring=ring, device=torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def _memory(numbers: MemoryNumbers, host_bytes: int) -> Memory:
    return Memory(
        peak_allocated_bytes=numbers.peak_bytes,
        host_pinned_peak_bytes=host_bytes,
        attention_intermediate_peak_bytes=numbers.attention_peak,
        attention_forward_peak_bytes=numbers.attention_forward_peak,
        attention_backward_peak_bytes=numbers.attention_backward_peak,
        peak_by_category_bytes=numbers.by_category,
        peak_by_phase_bytes=numbers.by_phase,
        largest_at_peak=numbers.largest,
    )
