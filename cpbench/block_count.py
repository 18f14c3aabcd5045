"""What one attention block holds and sends, counted over fake tensors; held against the closed forms of `costs`.

The block runs as in a checkpointed stack: a first forward of which nothing but its memo survives, the recomputation,
then the backward.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cpbench.case import Case
from cpbench.memory.categories import analyse
from cpbench.memory.fake_trace import FakeTrace
from cpbench.memory.timeline import Timeline
from cpbench.method import AttentionWeights, Method
from cpbench.runtime.collectives import CollectiveLog, CountCollectives
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.host_pool import HostPool
from cpbench.runtime.kernels import select_kernels
from cpbench.runtime.memo import Memo
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.rope import Rope
from cpbench.runtime.streams import Streams
from cpbench.runtime.tiles import sampled_tiles
from cpbench.train import DTYPES
from cpbench.world.fake import fake_world


@dataclass(slots=True)
class BlockCount:
    """Counted bytes of one block on one rank; compare `cpbench.method.Costs`."""

    forward_peak_bytes: int
    backward_peak_bytes: int
    host_bytes: int
    """Host memory that one block took."""
    forward_total_bytes: int = 0
    """Most bytes alive in forward, input and output included, weights left out."""
    backward_total_bytes: int = 0
    """Most bytes alive in the backward proper, x, dy and dx included, weights and their gradients left out."""
    forward: CollectiveLog = field(default_factory=CollectiveLog)
    recomputation: CollectiveLog = field(default_factory=CollectiveLog)
    backward: CollectiveLog = field(default_factory=CollectiveLog)
    timeline: Timeline = field(default_factory=Timeline)


def count_block(case: Case, method: Method, *, rank: int = 0, save_attention: bool = False) -> BlockCount:
    """Run one block of a case over fake tensors and return what it held and sent.

    Args:
        case: resolved.
        method: of the case.
        rank: the rank to run.
        save_attention: keep the attention output in host memory in the first forward.
    """
    layout = method.layout(case, rank)
    recorder = Recorder()
    trace = FakeTrace(recorder)
    count = BlockCount(0, 0, 0)
    with fake_world(case, layout, rank) as world, FakeTensorMode(), sampled_tiles(), trace:
        host = HostPool(world.device, Streams(world.device), recorder, asynchronous=case.device == "cuda")
        memo = Memo(host, save_attention=save_attention)
        ctx = AttentionContext(
            case=case,
            ulysses=world.ulysses,
            ring=world.ring,
            kernels=select_kernels(case),
            rope=Rope(layout.segments, case.architecture.rope_theta),
            recorder=recorder,
            host=host,
            memo=memo,
        )
        x, weights = _inputs(case)
        recorder.mark("weight", *weights.tensors())
        with recorder.scope("step:0"), recorder.scope("forward"), CountCollectives(count.forward):
            _forward(method, x, weights, ctx)
        memo.recomputing = True
        with recorder.scope("step:0"), recorder.scope("backward"):
            _backward(method, x, weights, replace(ctx, memo=memo), count)
    numbers = analyse(trace.timeline, step="step:0")
    count.forward_peak_bytes = numbers.attention_forward_peak
    count.backward_peak_bytes = numbers.attention_backward_peak
    count.host_bytes = host.peak_bytes
    count.timeline = trace.timeline
    count.forward_total_bytes = _total(trace.timeline, "forward")
    count.backward_total_bytes = _total(trace.timeline, "gradients")
    return count


def _total(timeline: Timeline, scope: str) -> int:
    """Peak of everything but host memory, weights and their gradients while a scope is open."""
    live = peak = 0
    for event in timeline.events:
        a = event.allocation
        if a.label in ("host", "weight", "weight_gradient"):
            continue
        live += -a.bytes if event.is_free else a.bytes
        if scope in event.scope:
            peak = max(peak, live)
    return peak


def _inputs(case: Case) -> tuple[Tensor, AttentionWeights]:
    a, dtype = case.architecture, DTYPES[case.dtype]
    x = torch.empty(case.batch_size, case.tokens_per_rank, a.hidden_dim, dtype=dtype)
    shapes = a.attention_shapes()
    return x, AttentionWeights(**{name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()})


def _forward(method: Method, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> None:
    with torch.no_grad(), ctx.recorder.scope("attention:0"):
        y = method.attention(x, weights, ctx)
        ctx.recorder.mark("attention_output", y)


def _backward(
    method: Method, x: Tensor, weights: AttentionWeights, ctx: AttentionContext, count: BlockCount
) -> None:
    recorder = ctx.recorder
    leaves = [t.requires_grad_() for t in (x, *weights.tensors()) if t is not None]
    with recorder.scope("attention:0"):
        with CountCollectives(count.recomputation):
            y = method.attention(x, weights, ctx)
            recorder.mark("attention_output", y)
        dy = torch.empty_like(y)
        recorder.mark("residual", dy)
        edge = torch.autograd.graph.get_gradient_edge(y)
        del y
        with recorder.scope("gradients"), CountCollectives(count.backward):
            dx, *grads = torch.autograd.grad([edge], leaves, [dy])
        recorder.mark("attention_input_gradient", dx)
        recorder.mark("weight_gradient", *grads)
