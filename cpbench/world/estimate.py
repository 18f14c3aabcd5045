"""The world without devices: one rank of W over fake tensors and a fake process group, its memory counted.

The same training step runs as in the measured world, once, after the optimizer states are made.  Tile loops run only
the tiles that differ (`cpbench.runtime.tiles`), and only a few layers run: the step over all of them is put together
from theirs (`cpbench.world.layers`), or all are run where that cannot be done exactly.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from cpbench.case import Case
from cpbench.errors import Uncountable, Unsupported
from cpbench.hardware import load_hardware
from cpbench.machine import threads_of_rank
from cpbench.memory.categories import MemoryNumbers, analyse
from cpbench.memory.fake_trace import FakeTrace
from cpbench.memory.timeline import Allocation, Event, Timeline
from cpbench.method import Method, representative_ranks
from cpbench.optimizer import OffloadedAdamW
from cpbench.record import Memory, RankReport, Software, WorkerReport
from cpbench.runtime.collectives import CollectiveLog, CountCollectives
from cpbench.runtime.kernels import cpu_scratch_is_known
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.tiles import sampled_tiles
from cpbench.timing.model import modelled_time
from cpbench.timing.oplog import OpLog
from cpbench.train import DTYPES, TrainStep
from cpbench.world.fake import fake_world
from cpbench.world.layers import Depth, NotPeriodic, Owner, Trace, host_peak_bytes, repeated

STEP = "step:1"
"""Scope of the step that counts."""
_EDGES = ((2, 1), (4, 3))
"""First and last layers that may be special in a shallow model, fewest first."""


@dataclass(slots=True)
class Traced:
    """What one step over fake tensors did."""

    trace: Trace
    kernel: str
    layers: int
    """Layers that ran."""


def ranks_to_run(case: Case, method: Method) -> tuple[int, ...]:
    """Return the rank that was asked for, or those that stand for all."""
    if case.rank is not None:
        return (case.rank,)
    return representative_ranks(partial(method.layout, case))


def estimate_ranks(case: Case, method: Method) -> WorkerReport:
    """Return what the ranks that stand for all would use, or the one that was asked for.

    Args:
        case: resolved, with mode estimate.
        method: of the case.

    Raises:
        Unsupported: the attention backend's inner memory is not known.
        Uncountable: an operator or collective is unknown to the count.
    """
    reports = [estimate_case(case, method, rank=rank) for rank in ranks_to_run(case, method)]
    ranks = tuple(rank for report in reports for rank in report.ranks)
    return reports[0].model_copy(update={"ranks": ranks})


def estimate_case(case: Case, method: Method, *, rank: int = 0) -> WorkerReport:
    """Return what one rank of a case would use.

    Args:
        case: resolved, with mode estimate.
        method: of the case.
        rank: the rank to run.

    Raises:
        Unsupported: the attention backend's inner memory is not known.
        Uncountable: an operator or collective is unknown to the count.
    """
    with _uncollected():
        return _estimated(case, method, rank)


def _estimated(case: Case, method: Method, rank: int) -> WorkerReport:
    traced = traced_step(case, method, rank=rank)
    numbers = analyse(Timeline(traced.trace.events), step=STEP)
    operations = [operation for _, operation in traced.trace.operations]
    log = CollectiveLog()
    for operation in operations:
        if operation.work == "collective":
            for _ in range(operation.times):
                log.add(operation.name, operation.size)
    sample, modelled = None, None
    rates = load_hardware(case.hardware).rates if case.hardware is not None else None
    if rates is not None and traced.kernel in rates.attention:
        sample, modelled = modelled_time(operations, rates, traced.kernel)
    report = RankReport(
        rank=rank,
        memory=_memory(numbers, host_peak_bytes(traced.trace.events)),
        samples=() if sample is None else (sample,),
        modelled=modelled,
        losses=(),
        grad_norms=(),
        collective_bytes=log.bytes,
        collective_calls=log.calls,
        attention_backend=traced.kernel,
    )
    return WorkerReport(ranks=(report,), software=Software(torch=torch.__version__))


def traced_step(
    case: Case, method: Method, *, rank: int = 0, edges: Sequence[tuple[int, int]] = _EDGES
) -> Traced:
    """Return the trace of a whole step: of few layers, repeated, or of all of them.

    Args:
        case: resolved.
        method: of the case.
        rank: the rank to run.
        edges: what to try; with none, all layers run.

    Raises:
        Unsupported: the attention backend's inner memory is not known.
    """
    if case.device == "cpu" and not cpu_scratch_is_known(DTYPES[case.dtype]):
        raise Unsupported(
            "the estimate does not know what torch's CPU kernels allocate inside for bfloat16 on this processor "
            "(oneDNN packs their operands); use --dtype float32, or --device cuda"
        )
    if case.attention_backend == "cudnn":
        raise Unsupported(
            'the estimate does not know cuDNN\'s workspace; set attention_backend = "auto" in [run] of the scenario'
        )
    traced = _traced(case, method, rank, edges)
    traced.trace.events[:0] = _workspace(case)
    return traced


def _workspace(case: Case) -> list[Event]:
    """What the library of matrix products keeps on the case's machine, from before the step."""
    size = load_hardware(case.hardware).allocator.workspace_bytes if case.hardware is not None else 0
    kept = Allocation(bytes=size, scope=(), site="workspace of matrix products", label="workspace")
    return [Event(kept, False, ())] if size and case.device == "cuda" else []


def _traced(case: Case, method: Method, rank: int, edges: Sequence[tuple[int, int]]) -> Traced:
    for below, above in edges:
        depth = Depth(_kinds(case), below, above)
        if depth.shallow >= depth.deep:
            break
        few = _run(_shallow(case, depth), method, rank)
        try:
            return Traced(repeated(few.trace, depth, step=STEP), few.kernel, depth.shallow)
        except NotPeriodic:
            continue
    return _run(case, method, rank)


def _run(case: Case, method: Method, rank: int) -> Traced:
    """Run a step over fake tensors, every layer of the case."""
    recorder = Recorder()
    log = OpLog(recorder, ranks_on_node=_ranks_on_node(case))
    layout = method.layout(case, rank)
    with (
        threads_of_a_rank(case),
        _uncollected(),
        fake_world(case, layout, rank) as world,
        FakeTensorMode(),
        sampled_tiles(),
        FakeTrace(recorder, log) as trace,
    ):
        log.trace = trace
        step = TrainStep(case, method, world, recorder)
        with recorder.scope("step:0"):
            step.make_optimizer_states()
        owners = _owners(step, trace)
        with recorder.scope(STEP), CountCollectives(log):
            log.active = True
            step.run(1)
            log.active = False
        result = Trace(
            list(trace.timeline.events),
            log.operations,
            owners,
            trace.origins,
            parameters=len(list(step.model.parameters())),
            parameters_of_layer=len(list(step.model.blocks[0].parameters())),
        )
    if log.unknown:
        raise Uncountable(
            f"the estimate does not know what these collectives send: {_names(log.unknown)}; "
            "use those of cpbench.runtime.collectives"
        )
    if trace.unknown:
        raise Uncountable(
            f"the estimate does not know what these operators allocate inside: {_names(trace.unknown)}; "
            "state it with cpbench.runtime.kernels.declare_scratch in the file that defines them"
        )
    return Traced(result, step.kernels.name, case.architecture.num_layers)


def _names(found: Iterable[str]) -> str:
    return ", ".join(sorted(set(found)))


def _ranks_on_node(case: Case) -> int:
    """Consecutive ranks that share a node: as many as the case puts there, and no more than there are GPUs."""
    ranks = case.world_size // case.nodes
    return ranks if case.hardware is None else min(ranks, load_hardware(case.hardware).gpus_per_node)


def _owners(step: TrainStep, trace: FakeTrace) -> dict[int, Owner]:
    """The layers of parameters and optimizer states; None for those of embedding and head."""
    layers: dict[int, Owner] = {
        id(parameter): layer
        for layer, block in enumerate(step.model.blocks)
        for parameter in block.parameters()
    }
    owners: dict[int, Owner] = {}
    for parameter in step.model.parameters():
        states = step.optimizer.state.get(parameter, {})
        for tensor in (parameter, *states.values()):
            allocation = trace.allocation_of(_local(tensor)) if isinstance(tensor, Tensor) else None
            if allocation is not None:
                owners[id(allocation)] = layers.get(id(parameter))
    if isinstance(step.optimizer, OffloadedAdamW):
        for owner, memory in step.optimizer.host_memory():
            allocation = trace.allocation_of(memory)
            if allocation is not None:
                owners[id(allocation)] = layers.get(id(owner))
    return owners


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _kinds(case: Case) -> tuple[int, ...]:
    """Consecutive layers that do the same."""
    layers = case.architecture.num_layers
    saved = min(_saved(case), layers)
    return tuple(count for count in (saved, layers - saved) if count)


def _shallow(case: Case, depth: Depth) -> Case:
    """The case with the layers of a shallow model."""
    architecture = case.architecture.model_copy(update={"num_layers": depth.shallow})
    update: dict[str, object] = {"architecture": architecture}
    if _saved(case):
        update["stack"] = case.stack.model_copy(update={"save_attention": depth.shallow_kinds[0]})
    return case.model_copy(update=update)


def _saved(case: Case) -> int:
    """How many layers, the first ones, keep their attention output in host memory."""
    saved = case.stack.save_attention
    return saved if isinstance(saved, int) else 0  # a resolved case has a number


@contextmanager
def threads_of_a_rank(case: Case) -> Iterator[None]:
    """The threads that a CPU process of a measured case would have: its kernels' scratch depends on them."""
    before = torch.get_num_threads()
    if case.device == "cpu":
        torch.set_num_threads(threads_of_rank(case.world_size))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No collection of cycles: it takes long and would put frees of fake tensors at a place that no one can repeat."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _memory(numbers: MemoryNumbers, host_bytes: int) -> Memory:
    return Memory(
        peak_allocated_bytes=numbers.peak_bytes,
        host_pinned_peak_bytes=host_bytes,
        attention_intermediate_peak_bytes=numbers.attention_peak,
        attention_forward_peak_bytes=numbers.attention_forward_peak,
        attention_backward_peak_bytes=numbers.attention_backward_peak,
        attention_stage_peak_bytes=numbers.attention_stage_peak,
        peak_by_category_bytes=numbers.by_category,
        peak_by_phase_bytes=numbers.by_phase,
        largest_at_peak=numbers.largest,
    )
