"""Runs the steps of one case on one rank and reports what was measured.

On CPU the first two steps run under the memory trace (the second is the one reported: the first makes the optimizer
states) and are warm-up; the timed steps run without any instrumentation.  On CUDA the same two steps give the split by
category, and the headline peaks come from the allocator's statistics over the timed steps.

An emulated rank makes its optimizer states without a first step, because values do not matter there: one traced step
saves much time at long lengths.
"""

from __future__ import annotations

import gc
import hashlib
import math
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cpbench import registry
from cpbench.case import TRACED_STEPS, Case
from cpbench.machine import nvml
from cpbench.memory.categories import MemoryNumbers, analyse
from cpbench.memory.cpu_trace import CpuTrace
from cpbench.memory.cuda_trace import CudaTrace
from cpbench.method import Method
from cpbench.progress_file import write_progress
from cpbench.record import Memory, RankReport, ShallowSteps, Software, StepSample, WorkerReport
from cpbench.runtime.collectives import CollectiveLog, CountCollectives
from cpbench.runtime.python_group import counting
from cpbench.runtime.recorder import Recorder
from cpbench.train import TrainStep, World
from cpbench.world.emulate import emulated_world, estimated
from cpbench.world.estimate import estimate_ranks
from cpbench.world.measure import measured_world


def run_case(case: Case, plugins: Sequence[Path], scratch: Path) -> WorkerReport:
    """Run a resolved case on this rank and return the reports of all ranks.

    Args:
        case: what to run.
        plugins: method files outside the tree.
        scratch: folder for progress.
    """
    method = registry.load(case.method, case.options, plugins)
    method.check(case)
    if case.mode == "estimate":
        write_progress(scratch, phase="counting memory over fake tensors", done=0, total=1, now=time.time())
        return estimate_ranks(case, method)
    if case.mode == "emulate":
        return _emulated(case, method, scratch)
    with measured_world(case, method.layout(case, 0)) as world:
        run = CaseRun(case, world, scratch)
        step = run.traced(method)
        run.timed(step)
        return _gathered(run.report(step), world)


def _emulated(case: Case, method: Method, scratch: Path) -> WorkerReport:
    """Run one rank alone; nothing of it is left when the case is estimated."""
    rank = case.rank or 0
    with emulated_world(case, method.layout(case, rank), rank) as world:
        run = CaseRun(case, world, scratch)
        step = run.traced(method)
        run.timed(step)
        report = run.report(step)
        del step
        report, notes = _with_shallow_steps(case, method, world, scratch, report)
    estimate = estimated(case, method, rank)
    return WorkerReport(
        ranks=(report,),
        software=_software(world.device),
        gpu=_gpu(world.device),
        communication_seconds=estimate.communication_seconds,
        estimated_peak_bytes=estimate.peak_bytes,
        notes=(*notes, estimate.note),
    )


def _with_shallow_steps(
    case: Case, method: Method, world: World, scratch: Path, report: RankReport
) -> tuple[RankReport, tuple[str, ...]]:
    """The report with the times of half as many layers, if it is to be scaled to all of the model's; and notes."""
    layers = case.architecture.num_layers
    if case.model_layers is None:
        return report, ()
    ran = f"{layers} of the model's {case.model_layers} layers ran: memory and durations are theirs"
    if layers == 1 or case.stack.save_attention:
        why = "one layer count" if layers == 1 else "layers of two kinds (save_attention)"
        return report, (f"{ran}; nothing is scaled, because {why} cannot say what a layer costs",)
    gc.collect()  # FSDP's modules hold one another
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    few = case.architecture.model_copy(update={"num_layers": layers // 2})
    run = CaseRun(case.model_copy(update={"architecture": few}), world, scratch)
    run.timed(run.prepared(method))
    shallow = ShallowSteps(layers=layers // 2, step_seconds=tuple(s.step_seconds for s in run.samples))
    note = f"{ran}; only compute_seconds_of_model is for all, from the steps of {layers // 2} and {layers} layers"
    return report.model_copy(update={"shallow": shallow}), (note,)


class CaseRun:
    """One rank's progress through a case."""

    def __init__(self, case: Case, world: World, scratch: Path) -> None:
        self.case = case
        self.world = world
        self.log = CollectiveLog()
        self.memory = MemoryNumbers()
        self.samples: list[StepSample] = []
        self.warmup_seconds: list[float] = []
        self.losses: list[float | None] = []
        self.grad_norms: list[float | None] = []
        self._scratch = scratch
        self._reserved = 0
        self._allocated = 0
        self._emulated = case.mode == "emulate"
        self._first = TRACED_STEPS - 1 if self._emulated else 0
        self._total = max(case.warmup, TRACED_STEPS) + case.steps

    def prepared(self, method: Method) -> TrainStep:
        """Build the step and run the warm-up that the trace would be."""
        step = TrainStep(self.case, method, self.world, Recorder(device_type=self.world.device.type))
        if self._emulated:
            step.make_optimizer_states()
        for index in range(self._first, TRACED_STEPS):
            self._one(step, index)
        return step

    def traced(self, method: Any) -> TrainStep:  # noqa: ANN401 - a Method, loaded by name
        """Build the step and run the first ones under the memory trace."""
        recorder = Recorder(device_type=self.world.device.type)
        self._progress("building the model", 0)
        if self.world.device.type == "cpu":
            trace: CpuTrace | CudaTrace = CpuTrace(recorder)
            trace.start()
            step = TrainStep(self.case, method, self.world, recorder)
        else:
            step = TrainStep(self.case, method, self.world, recorder)
            trace = CudaTrace(recorder)
            trace.start()
        if self._emulated:
            with recorder.scope("step:0"):
                step.make_optimizer_states()
        for index in range(self._first, TRACED_STEPS):
            with recorder.scope(f"step:{index}"), self._counting(index):
                self._one(step, index)
        timeline = trace.stop()
        if timeline.unseen_frees:
            lost = f"{timeline.unseen_frees} bytes were freed on untraced threads; the peak may be too high by them"
            sys.stderr.write(f"memory trace: {lost}\n")
        self.memory = analyse(timeline, step=f"step:{TRACED_STEPS - 1}")
        return step

    def timed(self, step: TrainStep) -> None:
        """Run the rest of the warm-up, then the timed steps."""
        for index in range(TRACED_STEPS, self._total - self.case.steps):
            self._one(step, index)
        for index in range(self._total - self.case.steps, self._total):
            if self.world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            dist.barrier()  # ranks start a timed step together, so that waiting for a late one is not counted
            self.samples.append(self._one(step, index))
            self.warmup_seconds.pop()
            if self.world.device.type == "cuda":
                self._allocated = max(self._allocated, torch.cuda.max_memory_allocated())
                self._reserved = max(self._reserved, torch.cuda.max_memory_reserved())

    def _counting(self, index: int) -> AbstractContextManager[object]:
        """Counts the collectives of the first step: the counting mode would blur the profiler's nesting."""
        if index != self._first:
            return nullcontext()
        return counting(self.log) if self._emulated else CountCollectives(self.log)

    def report(self, step: TrainStep) -> RankReport:
        """Return what this rank measured."""
        if self.log.unknown:
            raise RuntimeError(
                f"collectives that are not counted: {', '.join(sorted(set(self.log.unknown)))}"
            )
        return RankReport(
            rank=self.world.rank,
            memory=self._memory(step),
            samples=tuple(self.samples),
            warmup_seconds=tuple(self.warmup_seconds),
            losses=tuple(self.losses),
            grad_norms=tuple(self.grad_norms),
            collective_bytes=self.log.bytes,
            collective_calls=self.log.calls,
            collectives_hash=hashlib.sha256(repr(self.log.sequence).encode()).hexdigest()[:16],
            attention_backend=step.kernels.name,
        )

    def _one(self, step: TrainStep, index: int) -> StepSample:
        self._progress("tracing memory" if index < TRACED_STEPS else "step", index)
        result = step.run(index)
        forward, backward, optimizer = step.clock.durations()
        sample = StepSample(
            step_seconds=forward + backward + optimizer,
            forward_seconds=forward,
            backward_seconds=backward,
            optimizer_seconds=optimizer,
        )
        self.warmup_seconds.append(sample.step_seconds)
        self.losses.append(_finite(result.loss.item()))
        self.grad_norms.append(_finite(result.grad_norm.item()))
        return sample

    def _memory(self, step: TrainStep) -> Memory:
        numbers = self.memory
        common = {
            "host_rss_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "host_pinned_peak_bytes": step.host_pool.peak_bytes,
            "attention_intermediate_peak_bytes": numbers.attention_peak,
            "attention_forward_peak_bytes": numbers.attention_forward_peak,
            "attention_backward_peak_bytes": numbers.attention_backward_peak,
            "attention_stage_peak_bytes": numbers.attention_stage_peak,
            "peak_by_category_bytes": numbers.by_category,
            "peak_by_phase_bytes": numbers.by_phase,
            "largest_at_peak": numbers.largest,
        }
        if self.world.device.type == "cpu":
            return Memory.model_validate(common | {"peak_allocated_bytes": numbers.peak_bytes})
        return Memory.model_validate(common | self._cuda_memory())

    def _cuda_memory(self) -> dict[str, int | None]:
        used = _device_used(self.world.device)
        reserved = torch.cuda.memory_reserved()
        return {
            "peak_allocated_bytes": self._allocated,
            "peak_reserved_bytes": self._reserved,
            "device_used_bytes": used,
            "non_torch_bytes": None if used is None else used - reserved,
            "alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
        }

    def _progress(self, phase: str, done: int) -> None:
        if self.world.rank == 0:
            write_progress(self._scratch, phase=phase, done=done, total=self._total, now=time.time())


def _gathered(report: RankReport, world: World) -> WorkerReport:
    """All ranks' reports, on every rank; JSON and not pickles travel."""
    text = report.model_dump_json().encode()
    lengths = torch.zeros(world.mesh.size(), dtype=torch.int64, device=world.device)
    lengths[world.rank] = len(text)
    dist.all_reduce(lengths)
    padded = torch.zeros(world.mesh.size(), int(lengths.max()), dtype=torch.uint8, device=world.device)
    padded[world.rank, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(world.device)
    dist.all_reduce(padded)
    ranks = tuple(
        RankReport.model_validate_json(bytes(row[:length].tolist()))
        for row, length in zip(padded.cpu(), lengths.tolist(), strict=True)
    )
    return WorkerReport(ranks=ranks, software=_software(world.device), gpu=_gpu(world.device))


def _gpu(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _software(device: torch.device) -> Software:
    if device.type != "cuda":
        return Software(torch=torch.__version__)
    nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    return Software(torch=torch.__version__, cuda=torch.version.cuda, nccl=nccl)


def _device_used(device: torch.device) -> int | None:
    """NVML's bytes in use on this rank's device, found by its UUID so that CUDA_VISIBLE_DEVICES does not mislead."""
    with nvml() as library:
        if library is None:
            return None
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return int(library.nvmlDeviceGetMemoryInfo(library.nvmlDeviceGetHandleByUUID(uuid.encode())).used)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
