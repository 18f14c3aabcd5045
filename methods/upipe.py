"""UPipe (Untied Ulysses, 2026): project, exchange and attend for a few heads at a time, so buffers are stage-sized.

Source: arXiv 2602.21196; the schedule below is the general form of its GQA schedule, and goes beyond it:

    no full width           a stage's output goes to host memory, and y is made of all of them token tile by token
                            tile; in backward a stage's output gradient comes straight from dy, and its dq, dk, dv
                            go to host memory until dx is made of all of them in the same way.  So neither the
                            attention output nor its gradient nor dx is on the device beside a stage, and y and dx
                            are rounded once, however many stages there are
    one at a time           v, k and q are projected and sent one after another, each source freed when packed

`published=True` runs the published scheme instead, for comparison.

Communication: as Ulysses with un-replicated K/V: forward q, k, v, out; backward q, k, v again, out, dout, dq, dk, dv.
Memory: everything for one stage (m = M U/H); nothing of full attention width M (published: the output and its
    gradient).  `keep_output` says where the parts of full-width activations wait, for one layer at a time, per rank:
        host        M (1 + 2/g) + L bytes of host memory; a layer moves 3.5 M out and 4.5 M in for g = 4, under 2 % of
                    the attention time from 1M tokens on at 50 GB/s, beside compute; default where the stack offloads
        device      as many bytes of device memory; default where the stack does not offload
        recompute   the output is not kept at all: the attention forward runs a third time, 5.5 units of attention
                    work for 4.5; parts wait on the device
Accumulation: y and dx in float32 inside one GEMM over all stages; dk, dv over the stages of a group in the compute
    dtype; each row of a weight gradient comes from one GEMM.
Limits: the degree C divides num_heads; stage_heads U is a multiple of C that divides num_heads; s divisible by the
    ranks (by 2 R C for a ring degree R above 1).

The stages.  K/V heads are handled in groups of G, q heads in stages of U: stage r of a group takes t = U/G query
heads of each of its KV heads, so K/V of a group are projected and sent once and serve all of its stages.  With
replication (fewer KV heads than ranks) "KV head" means a copy.  Heads of a stage are strided rows of the true weight,
so a pretrained checkpoint gives the same function.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cpbench.case import Case
from cpbench.errors import Unsupported, UsageError
from cpbench.method import ATTENTION_WEIGHTS, AttentionWeights, Costs, Layout, hybrid_segments
from cpbench.model_config import ModelConfig
from cpbench.runtime.collectives import (
    HeadsPending,
    all_to_all_heads,
    all_to_all_sequence,
    start_all_to_all_heads,
)
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.costs import HeadBytes, sent
from cpbench.runtime.kv_replication import replicas, replicate_heads, sum_replicas
from cpbench.runtime.parts import Parts, Place
from cpbench.runtime.projection import Projection, ProjectionGradients, Which, head_gradient, project
from cpbench.runtime.ring_attention import RingAttention
from cpbench.runtime.ring_costs import RingShape, Views

KEEP = ("auto", "host", "device", "recompute")


@dataclass(frozen=True, kw_only=True, slots=True)
class UPipe:
    """Head-chunked Ulysses, alone or with a ring across Ulysses groups."""

    stage_heads: int = 0
    """Query heads of a stage over the whole Ulysses group, U; 0 takes the degree C, the leanest."""
    ring_degree: int = 1
    """Ring ranks R; the Ulysses degree is world_size / R."""
    keep_output: str = "auto"
    """Where stage outputs and gradients wait: host, device, recompute (outputs), auto (host if the stack offloads)."""
    overlap: bool = False
    """The next stage's projections and all-to-all run beside a stage's attention, for 2 more stage-sized buffers (6
    where the next stage begins a KV group)."""
    published: bool = False
    """The published scheme: full-width attention output and output gradient; q, k, v sent together."""

    def __post_init__(self) -> None:
        """Refuse negative sizes, unknown names and options that the published scheme does not have."""
        if self.stage_heads < 0:
            raise UsageError(
                f"upipe.stage_heads={self.stage_heads} is negative; use 0 for the Ulysses degree"
            )
        if self.ring_degree < 1:
            raise UsageError(f"upipe.ring_degree={self.ring_degree} must be at least 1")
        if self.keep_output not in KEEP:
            raise UsageError(f"upipe.keep_output={self.keep_output!r} is not one of {', '.join(KEEP)}")
        if self.published and (self.overlap or self.keep_output != "auto"):
            raise UsageError(
                "upipe.published=true has no overlap and keeps its output on the device; "
                "leave overlap and keep_output at their defaults"
            )

    def check(self, case: Case) -> None:
        """Refuse degrees, heads, stages and lengths that do not divide."""
        heads, ranks, ring = case.architecture.num_heads, case.world_size, self.ring_degree
        if ranks % ring:
            raise Unsupported(
                f"upipe: ring_degree={ring} does not divide world_size={ranks}; choose one that does"
            )
        degree = ranks // ring
        if heads % degree:
            allowed = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            raise Unsupported(
                f"upipe: num_heads={heads} is not divisible by the Ulysses degree {degree}; "
                f"use a degree of {', '.join(allowed)} (set upipe.ring_degree), or method ring"
            )
        stage = self.stage_heads or degree
        if stage % degree or heads % stage:
            allowed = [str(n) for n in range(degree, heads + 1, degree) if heads % n == 0]
            raise Unsupported(
                f"upipe: stage_heads={stage} must be a multiple of the Ulysses degree {degree} and divide "
                f"num_heads={heads}; use 0 or one of {', '.join(allowed)}"
            )
        if self.published and case.stack.save_attention:
            raise Unsupported(
                "upipe: the published scheme recomputes its attention; use save_attention=0 or published=false"
            )
        parts = ranks * (2 if ring > 1 else 1)
        if case.seq_len % parts:
            raise Unsupported(
                f"upipe: seq_len={case.seq_len} is not divisible by {parts}; "
                f"use a multiple, for example {max(parts, case.seq_len // parts * parts)}"
            )

    def layout(self, case: Case, rank: int) -> Layout:
        """Zigzag over the ring, contiguous over the Ulysses group."""
        degree = case.world_size // self.ring_degree
        segments = hybrid_segments(case.seq_len, degree, self.ring_degree, rank)
        return Layout(ulysses_degree=degree, ring_degree=self.ring_degree, segments=segments)

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """Attention stage by stage; see `cpbench.method.Method.attention`."""
        stages = Stages.of(ctx.case.architecture, ctx.ulysses.size, self.stage_heads or ctx.ulysses.size)
        if self.published:
            out: Tensor = _Published.apply(x, ctx, stages, *weights.tensors())
            return torch.matmul(out.flatten(2), weights.wo.t())
        plan = _Plan(stages, self._keep(ctx.case), self.overlap)
        return _Fused.apply(x, ctx, plan, *weights.tensors())  # type: ignore[no-any-return]

    def _keep(self, case: Case) -> str:
        """Return where stage outputs wait."""
        if self.keep_output != "auto":
            return self.keep_output
        return "host" if case.stack.offload == "inputs" else "device"

    def costs(self, case: Case) -> Costs:
        """Closed forms; M, K' the bytes of all query heads and of all KV copies of the local n = s/W tokens.

        All-to-all over C ranks, B bytes send B (C-1)/C.  Forward moves q, k, v, out as Ulysses does: 2M + 2K'.
        Backward moves q, k, v again, and out, dout, dq, dk, dv: 4M + 4K'.

        Ring over R ranks: every stage sends the K/V of its group, so a group's K/V travel once for each of its g'/t
        stages.  With T = K' g'/t, in bytes: forward 2T (R-1); backward 2T (R-1) + 2 f T R, f = 4 / bytes per element.

        Peaks, with m = M U/H, c one of k, v of a group, l the log-sum-exp of a stage: the most of any stage i of P, of

            forward     q, k, v, out, l: 2m + 2c + l, and what attention holds inside; on CUDA the part before, on its
                        way to the host: m (device: i m)
            backward    q, out, dout, dq: 4m; k, v, dk, dv: 4c; l, and what attention holds inside (both with a ring:
                        `cpbench.runtime.ring_costs`); sums of dk, dv of earlier turns: 2c
                        (device: P-1 parts of outputs and gradients, and the l still to come; recompute: i parts)
            overlap     the next stage's q: 2m; in a new group also its k, v: 4c
            published   out: M, forward; out and dout: 2M, backward (C = 1: a stage has views of them, which the
                        kernel copies); every l; q, k, v all projected before any is sent: 2m + 5c, or 3m + 2c
        """
        c, r = case.world_size // self.ring_degree, self.ring_degree
        size = HeadBytes.of(case, tokens=case.tokens_per_rank)
        stages = Stages.of(case.architecture, c, self.stage_heads or c)
        kv = size.kv * stages.copies
        forward: dict[str, int] = {}
        backward: dict[str, int] = {}
        if c > 1:
            forward["all_to_all"] = 2 * sent(size.q, c) + 2 * sent(kv, c)
            backward["all_to_all"] = 4 * sent(size.q, c) + 4 * sent(kv, c)
        if r > 1:
            travels = kv * stages.ratio // stages.per_stage
            forward["send"] = 2 * travels * (r - 1)
            backward["send"] = forward["send"] + 2 * travels * 4 // size.element * r
        peak = self._published_peak if self.published else self._peak
        return Costs(
            forward_collective_bytes=forward,
            backward_collective_bytes=backward,
            forward_peak_bytes=peak(case, stages, backward=False),
            backward_peak_bytes=peak(case, stages, backward=True),
        )

    def _peak(self, case: Case, stages: Stages, *, backward: bool) -> int:
        unit = _StageBytes.of(case, stages, self.ring_degree)
        schedule = stages.schedule()
        keep = self._keep(case)
        most = 0
        for i, stage in enumerate(schedule):
            here = unit.backward if backward else unit.forward
            if backward and not stage.first:
                here += 2 * unit.kv
            if keep == "host":
                here += unit.q if i and not backward and case.device == "cuda" else 0
            else:
                here += i * unit.q
            if backward and keep != "host":
                here += 2 * (unit.kv // stages.copies) * sum(earlier.last for earlier in schedule[:i])
            if backward and keep == "device":
                here += (len(schedule) - 1 - i) * (unit.q + unit.lse)
            if self.overlap and i + 1 < len(schedule):
                here += unit.buffers * (unit.q + (2 * unit.kv if schedule[i + 1].first else 0))
            most = max(most, here)
        return most

    def _published_peak(self, case: Case, stages: Stages, *, backward: bool) -> int:
        schedule = stages.schedule()
        count = len(schedule)
        views: Views = "none"
        if self.ring_degree == case.world_size:  # nothing is exchanged, so nothing is put into other memory
            views = "columns" if count > 1 else "whole"
        unit = _StageBytes.of(case, stages, self.ring_degree, views=views)
        if backward:
            turns = 0 if all(stage.first for stage in schedule) else 2 * unit.kv
            return (2 * unit.q + unit.lse) * count + unit.backward - unit.lse + turns
        most = 0
        for i, stage in enumerate(schedule):
            sending = 3 * unit.q + 2 * unit.kv
            if stage.first:
                sending = max(sending, 2 * unit.q + 5 * unit.kv)
            sending = sending if unit.buffers == 2 else 0
            most = max(most, count * unit.q + i * unit.lse + max(sending, unit.forward))
        return most


METHOD = UPipe
VERIFY_OPTIONS = (
    {"keep_output": "device"},
    {"keep_output": "recompute"},
    {"keep_output": "host", "overlap": True},
    {"stage_heads": 8},
    {"stage_heads": 16},
    {"ring_degree": 2},
    {"ring_degree": 4, "overlap": True},
    {"published": True},
    {"published": True, "ring_degree": 2},
)
PLAN_OPTIONS = ({"ring_degree": 2}, {"ring_degree": 4}, {"overlap": True}, {"keep_output": "device"})


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass of projection, exchange and attention."""

    group: slice
    """KV copies."""
    turn: slice
    """Which of each copy's query heads."""
    first: bool
    """Of its group: K/V are new."""
    last: bool
    """Of its group: K/V are done with."""


@dataclass(frozen=True, slots=True)
class Stages:
    """Which heads each stage takes; KV heads are counted after replication."""

    num_kv_heads: int
    """Copies of KV heads, a multiple of the degree."""
    copies: int
    """Copies of each KV head."""
    ratio: int
    """Query heads a copy serves."""
    group: int
    """KV copies of a group, G."""
    per_stage: int
    """Query heads of each KV copy in a stage, t = U / G."""

    @classmethod
    def of(cls, architecture: ModelConfig, degree: int, stage_heads: int) -> Stages:
        """Return the schedule with the fewest KV heads a group, so that K/V take least memory.

        With k = U/C and g' query heads a copy, t = gcd-like: the largest divisor of k that divides g'.  Then G = U/t
        is a multiple of C and divides the copies.
        """
        copies = replicas(architecture.num_kv_heads, degree)
        num_kv_heads = architecture.num_kv_heads * copies
        ratio = architecture.num_heads // num_kv_heads
        per_rank = stage_heads // degree
        per_stage = next(
            t
            for t in range(per_rank, 0, -1)
            if per_rank % t == 0 and ratio % t == 0 and num_kv_heads % (stage_heads // t) == 0
        )
        return cls(num_kv_heads, copies, ratio, stage_heads // per_stage, per_stage)

    def groups(self) -> Iterator[slice]:
        """Yield the KV copies of each group."""
        for start in range(0, self.num_kv_heads, self.group):
            yield slice(start, start + self.group)

    def turns(self) -> Iterator[slice]:
        """Yield, for each stage of a group, which of a copy's query heads it takes."""
        for start in range(0, self.ratio, self.per_stage):
            yield slice(start, start + self.per_stage)

    def schedule(self) -> list[Stage]:
        """Return the stages in order."""
        turns = list(self.turns())
        return [
            Stage(group, turn, first=turn == turns[0], last=turn == turns[-1])
            for group in self.groups()
            for turn in turns
        ]

    def by_copy(self, t: Tensor, *, dim: int) -> Tensor:
        """View a dimension of query heads as [KV copy, query head of the copy]."""
        view: Tensor = t.unflatten(dim, (self.num_kv_heads, self.ratio))
        return view

    def originals(self, group: slice) -> slice:
        """Return the KV heads of the model whose copies make up a group."""
        return slice(group.start // self.copies, group.stop // self.copies)


@dataclass(frozen=True, slots=True)
class _Plan:
    stages: Stages
    keep: str
    """host, device or recompute."""
    overlap: bool


@dataclass(frozen=True, slots=True)
class _StageBytes:
    """Sizes that the peaks are made of."""

    q: int
    """One of q, out, dq, dout of a stage, m."""
    kv: int
    """One of k, v, dk, dv of a group, in head layout, c."""
    lse: int
    """Log-sum-exp of a stage, l."""
    forward: int
    """All that attention's forward has in use."""
    backward: int
    """All that attention's backward has in use."""
    buffers: int
    """Buffers of a tensor on its way into head layout: packed and received, or in a group of one the tensor itself."""

    @classmethod
    def of(cls, case: Case, stages: Stages, ring_degree: int, *, views: Views = "none") -> _StageBytes:
        """Return the sizes of a case on one rank; `views`: what a stage has of out and dout."""
        degree = case.world_size // ring_degree
        heads, kv_heads = stages.group * stages.per_stage // degree, stages.group // degree
        shape = RingShape.of(
            case, ring_degree=ring_degree, heads=heads, kv_heads=kv_heads, kept=True, views=views
        )
        return cls(
            q=shape.q,
            kv=shape.kv,
            lse=shape.lse,
            forward=shape.forward_bytes(),
            backward=shape.backward_bytes(),
            buffers=2 if degree > 1 else 1,
        )


class _Fused(torch.autograd.Function):
    """Normalised hidden states to the attention block's output, `[b, n, d]`."""

    @staticmethod
    def forward(
        node: Any,  # noqa: ANN401 - autograd's context has no public type
        x: Tensor,
        ctx: AttentionContext,
        plan: _Plan,
        *tensors: Tensor | None,
    ) -> Tensor:
        block = _StageBlock(x, AttentionWeights.of(tensors), ctx, plan.stages)
        schedule = plan.stages.schedule()
        inputs = _Inputs(block, schedule, overlap=plan.overlap)
        kept = _StageOutputs(ctx, plan.keep)
        if not kept.remembered:
            for index in range(len(schedule)):
                handed = _attend(block, inputs, index)
                kept.put(all_to_all_sequence(handed.pop(), ctx.ulysses, ctx.recorder), handed.pop())
        y = torch.empty_like(x)
        kept.outputs.project(block.output_weight(schedule), y)
        kept.forward_done()
        node.save_for_backward(x, *tensors)
        node.kept, node.ctx, node.plan = kept, ctx, plan
        return y

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> Any:  # noqa: ANN401 - autograd's context has no public type
        (dy,) = grads
        x, *tensors = node.saved_tensors
        ctx: AttentionContext = node.ctx
        plan: _Plan = node.plan
        kept: _StageOutputs = node.kept
        node.kept = None
        block = _StageBlock(x, AttentionWeights.of(tensors), ctx, plan.stages)
        schedule = plan.stages.schedule()
        inputs = _Inputs(block, schedule, overlap=plan.overlap)
        sums = block.gradients()
        dwo = torch.empty_like(block.weights.wo)
        ctx.recorder.mark("weight_gradient", dwo)
        parts = Parts(ctx.host, "host" if plan.keep == "host" else "device", ctx.parts_tile)
        dk: Tensor | None = None
        dv: Tensor | None = None
        for index, stage in enumerate(schedule):
            kept.prefetch(index)  # arrives beside the projections below
            k, v = inputs.keys_values(index)
            q = inputs.queries(index)
            dout = all_to_all_heads(block.output_gradient(dy, stage), ctx.ulysses, ctx.recorder)
            if kept.recomputes:
                out, lse = block.ring.forward(q, k, v)
                block.take_output(dwo, dy, all_to_all_sequence(out, ctx.ulysses, ctx.recorder), stage)
            else:
                *local, lse = kept.take(index)
                block.take_output(dwo, dy, local[0], stage)
                out = all_to_all_heads(local.pop(), ctx.ulysses, ctx.recorder)
            inputs.start(index + 1)
            dq, stage_dk, stage_dv = block.ring.backward(dout, q, k, v, out, lse)
            del q, k, v, out, dout, lse
            dk = stage_dk if dk is None else dk.add_(stage_dk)
            dv = stage_dv if dv is None else dv.add_(stage_dv)
            del stage_dk, stage_dv
            inputs.release(index)
            parts.put(block.take("q", sums, dq, stage))
            del dq
            if stage.last:
                # Handed over in a list, so that no local of ours holds them while they are sent.
                handed = [dv, dk]
                dk = dv = None
                parts.put(block.take("k", sums, handed.pop(), stage))
                parts.put(block.take("v", sums, handed.pop(), stage))
        dx = torch.empty_like(x)
        ctx.recorder.mark("attention_input_gradient", dx)
        parts.project(block.input_weight(schedule), dx)
        parts.drop()
        return dx, None, None, *_in_order(sums, dwo)


def _attend(block: _StageBlock, inputs: _Inputs, index: int) -> list[Tensor]:
    """Log-sum-exp and output in head layout of a stage; q is freed on return, K/V after the group's last stage.

    In a list, so that the caller can pass each on without holding it.
    """
    k, v = inputs.keys_values(index)
    q = inputs.queries(index)
    inputs.start(index + 1)
    out, lse = block.ring.forward(q, k, v)
    inputs.release(index)
    return [lse, out]


class _Inputs:
    """q, k and v of each stage in head layout, made when asked for, or started one stage ahead."""

    def __init__(self, block: _StageBlock, schedule: list[Stage], *, overlap: bool) -> None:
        self._block = block
        self._schedule = schedule
        self._overlap = overlap
        self._started_q: dict[int, HeadsPending] = {}
        self._started_kv: dict[int, tuple[HeadsPending, HeadsPending]] = {}
        self._kv: tuple[Tensor, Tensor] | None = None

    def keys_values(self, index: int) -> tuple[Tensor, Tensor]:
        """Return k and v of a stage's group; they live until `release` of the group's last stage."""
        stage = self._schedule[index]
        if stage.first:
            started = self._started_kv.pop(index, None)
            if started is None:
                v = self._block.start("v", stage).wait()
                self._kv = self._block.start("k", stage).wait(), v
            else:
                self._kv = started[0].wait(), started[1].wait()
        if self._kv is None:
            raise AssertionError("a group begins with its first stage")
        return self._kv

    def queries(self, index: int) -> Tensor:
        """Return q of a stage; the caller owns it."""
        started = self._started_q.pop(index, None)
        return (started or self._block.start("q", self._schedule[index])).wait()

    def start(self, index: int) -> None:
        """Start the projections and exchanges of a stage, if they overlap and there is such a stage."""
        if not self._overlap or index == len(self._schedule):
            return
        stage = self._schedule[index]
        if stage.first:
            v = self._block.start("v", stage)
            self._started_kv[index] = self._block.start("k", stage), v
        self._started_q[index] = self._block.start("q", stage)

    def release(self, index: int) -> None:
        """Drop k and v after the last stage of a group."""
        if self._schedule[index].last:
            self._kv = None


class _StageOutputs:
    """Outputs `[b, n, U, e]` and log-sum-exps of the stages, between forward and backward.

    Of the first forward of a checkpointed block they survive only if the stack saves attention, in the block's memo.
    """

    def __init__(self, ctx: AttentionContext, keep: str) -> None:
        memo, tile = ctx.memo, ctx.parts_tile
        self.remembered = memo is not None and memo.recomputing and "out0" in memo
        """Whether the first forward left them."""
        self._memo = memo if memo is not None and memo.save_attention and not memo.recomputing else None
        self.recomputes = keep == "recompute" and not self.remembered and self._memo is None
        """Whether backward must compute them again."""
        self._passing = memo is not None and not memo.recomputing
        if memo is not None and self.remembered:
            count = len(memo.kept) // 2
            self.outputs = Parts.stored(ctx.host, [memo.kept.pop(f"out{i}") for i in range(count)], tile)
            self._lse = Parts.stored(ctx.host, [memo.kept.pop(f"lse{i}") for i in range(count)], tile)
            return
        place: Place = "host" if keep == "host" or self._memo is not None else "device"
        self.outputs = Parts(ctx.host, place, tile)
        self._lse = Parts(ctx.host, place, tile)

    def put(self, out: Tensor, lse: Tensor) -> None:
        """Keep those of the next stage."""
        self.outputs.put(out)
        del out
        if not self.recomputes and (self._memo is not None or not self._passing):
            self._lse.put(lse)

    def forward_done(self) -> None:
        """Drop what backward will not need, or leave to the memo what the recomputation may skip."""
        if self._memo is not None:
            for name, parts in (("out", self.outputs), ("lse", self._lse)):
                self._memo.kept |= {f"{name}{i}": stored for i, stored in enumerate(parts.give())}
        elif self._passing or self.recomputes:
            self.outputs.drop()

    def prefetch(self, index: int) -> None:
        """Start to bring those of a stage back from the host."""
        if not self.recomputes:
            self.outputs.prefetch(index)
            self._lse.prefetch(index)

    def take(self, index: int) -> tuple[Tensor, Tensor]:
        """Give up the output and log-sum-exp of a stage."""
        return self.outputs.take(index), self._lse.take(index)


class _Published(torch.autograd.Function):
    """Normalised hidden states to the attention output of all heads in true order, `[b, n, h, e]`.

    The published scheme: output and output gradient at full width, a stage's q, k and v projected before any is sent.
    """

    @staticmethod
    def forward(
        node: Any,  # noqa: ANN401 - autograd's context has no public type
        x: Tensor,
        ctx: AttentionContext,
        stages: Stages,
        *tensors: Tensor | None,
    ) -> Tensor:
        block = _StageBlock(x, AttentionWeights.of(tensors), ctx, stages)
        a = ctx.case.architecture
        out = x.new_empty((*x.shape[:2], a.num_heads, a.head_dim))
        ctx.recorder.mark("attention_full_width", out)
        by_copy = stages.by_copy(out, dim=2)
        row_sums: list[Tensor] = []
        kv: tuple[Tensor, Tensor] | None = None
        for stage in stages.schedule():
            q, k, v = block.together(stage, kv)
            kv = None if stage.last else (k, v)
            stage_out, lse = block.ring.forward(q, k, v)
            del q, k, v
            row_sums.append(lse)
            handed = [stage_out]
            del stage_out
            local = all_to_all_sequence(handed.pop(), ctx.ulysses, ctx.recorder)
            by_copy[:, :, stage.group, stage.turn] = local.unflatten(2, (stages.group, stages.per_stage))
            del local
        node.save_for_backward(x, out, *tensors)
        node.row_sums, node.ctx, node.stages = row_sums, ctx, stages
        return out

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> Any:  # noqa: ANN401 - autograd's context has no public type
        x, out, *tensors = node.saved_tensors
        stages: Stages = node.stages
        block = _StageBlock(x, AttentionWeights.of(tensors), node.ctx, stages)
        sums = block.gradients()
        node.ctx.recorder.mark("attention_full_width", grads[0])
        dx = torch.zeros_like(x)
        node.ctx.recorder.mark("attention_input_gradient", dx)
        flat_dx = dx.flatten(0, 1)
        by_copy, dout_by_copy = stages.by_copy(out, dim=2), stages.by_copy(grads[0], dim=2)
        row_sums = iter(node.row_sums)
        kv: tuple[Tensor, Tensor] | None = None
        dk: Tensor | None = None
        dv: Tensor | None = None
        for stage in stages.schedule():
            q, k, v = block.together(stage, kv)
            kv = None if stage.last else (k, v)
            stage_out, stage_dout = (
                all_to_all_heads(
                    full[:, :, stage.group, stage.turn].flatten(2, 3), block.ctx.ulysses, block.ctx.recorder
                )
                for full in (by_copy, dout_by_copy)
            )
            dq, stage_dk, stage_dv = block.ring.backward(stage_dout, q, k, v, stage_out, next(row_sums))
            del q, k, v, stage_out, stage_dout
            dk = stage_dk if dk is None else dk.add_(stage_dk)
            dv = stage_dv if dv is None else dv.add_(stage_dv)
            del stage_dk, stage_dv
            flat_dx.addmm_(block.take("q", sums, dq, stage), block.projection("q", stage).weight)
            del dq
            if stage.last:
                handed = [dv, dk]
                dk = dv = None
                flat_dx.addmm_(
                    block.take("k", sums, handed.pop(), stage), block.projection("k", stage).weight
                )
                flat_dx.addmm_(
                    block.take("v", sums, handed.pop(), stage), block.projection("v", stage).weight
                )
        return dx, None, None, *_in_order(sums, None)  # wo is the caller's


_Gradients = dict[Which, ProjectionGradients]
"""Gradients of the parameters of q, k and v, filled in stage by stage."""


def _in_order(sums: _Gradients, dwo: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the weights."""
    named = {"wo": dwo}
    for which, gradients in sums.items():
        named |= gradients.named(which)
    return tuple(named[name] for name in ATTENTION_WEIGHTS)


@dataclass(frozen=True, slots=True)
class _StageBlock:
    """The parts of a stage that forward and backward share."""

    x: Tensor
    weights: AttentionWeights
    ctx: AttentionContext
    stages: Stages

    @property
    def ring(self) -> RingAttention:
        return RingAttention(self.ctx.kernels, self.ctx.ring, self.ctx.scale, zigzag=True)

    def start(self, which: Which, stage: Stage) -> HeadsPending:
        """Q of a stage `[b, s/R, U/C, e]`, or k or v of its group `[b, s/R, G/C, e]`, on its way into head layout."""
        return start_all_to_all_heads(self._heads(which, stage), self.ctx.ulysses, self.ctx.recorder)

    def together(self, stage: Stage, kv: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v of a stage in head layout, all projected before the first is sent; K/V only if not given."""
        sources = [self._heads("q", stage)]
        if kv is None:
            sources += [self._heads("k", stage), self._heads("v", stage)]
        # The sources are held until the last is sent, as published.
        sent = [all_to_all_heads(t, self.ctx.ulysses, self.ctx.recorder) for t in sources]
        if kv is None:
            kv = sent[1], sent[2]
        return sent[0], *kv

    def output_weight(self, schedule: list[Stage]) -> Tensor:
        """The output projection with its input columns in the order of the stages, `[h*e, d]`, a copy."""
        return torch.cat([self._o_columns(stage) for stage in schedule], dim=1).t()

    def input_weight(self, schedule: list[Stage]) -> Tensor:
        """Rows of wq, wk and wv in the order in which the backward makes dq, dk and dv, a copy."""
        rows: list[Tensor] = []
        for stage in schedule:
            rows.append(self.projection("q", stage).weight)
            if stage.last:
                rows += [self.projection("k", stage).weight, self.projection("v", stage).weight]
        return torch.cat(rows)

    def output_gradient(self, dy: Tensor, stage: Stage) -> Tensor:
        """Gradient of a stage's output, `[b, n, U, e]`."""
        dout = dy @ self._o_columns(stage)
        return dout.view(*dout.shape[:-1], -1, self.ctx.case.architecture.head_dim)

    def take_output(self, dwo: Tensor, dy: Tensor, local: Tensor, stage: Stage) -> None:
        """Write a stage's columns of the output projection's gradient."""
        dw = dy.flatten(0, 1).t() @ local.flatten(2).flatten(0, 1)
        group, turn = self.stages.group, self.stages.per_stage
        self._by_heads(dwo)[:, stage.group, stage.turn] = dw.view(dw.shape[0], group, turn, -1)

    def gradients(self) -> _Gradients:
        """Buffers for the gradients of the parameters of q, k and v."""
        sums: _Gradients = {}
        for which, p in self.ctx.projections(self.weights).items():
            made = ProjectionGradients(
                torch.empty_like(p.weight),
                None if p.bias is None else torch.empty_like(p.bias),
                None if p.norm is None else torch.zeros_like(p.norm.weight, dtype=torch.float32),
            )
            self.ctx.recorder.mark("weight_gradient", *made.named(which).values())
            sums[which] = made
        return sums

    def take(self, which: Which, sums: _Gradients, grad: Tensor, stage: Stage) -> Tensor:
        """Turn dq of a stage, or dk or dv of its group, into gradients of parameters.

        Args:
            which: of the three.
            sums: buffers for the gradients.
            grad: in head layout.
            stage: a group's last, for k and v.

        Returns:
            What of it goes to dx, `[b*n, U*e]`, or `[b*n, (G/copies)*e]`.
        """
        projection, into = self.projection(which, stage), sums[which]
        local = all_to_all_sequence(grad, self.ctx.ulysses, self.ctx.recorder)
        local = sum_replicas(local, self._copies(which))
        flat, dbias, dnorm = head_gradient(local, self.x, projection)
        dw = flat.t() @ self.x.flatten(0, 1)
        for whole, part in ((into.weight, dw), (into.bias, dbias)):
            if whole is not None and part is not None:
                rows = self._rows(which, whole, stage)
                rows.copy_(part.view(rows.shape))
        if into.norm is not None and dnorm is not None:
            into.norm.add_(dnorm)
        return flat

    def projection(self, which: Which, stage: Stage) -> Projection:
        """What makes q of a stage (a copy of its rows), or k or v of its group."""
        whole = self.ctx.projections(self.weights)[which]
        bias = whole.bias
        return replace(
            whole,
            weight=self._rows(which, whole.weight, stage).reshape(-1, self.x.shape[-1]),
            bias=None if bias is None else self._rows(which, bias, stage).reshape(-1),
        )

    def _heads(self, which: Which, stage: Stage) -> Tensor:
        """Q of a stage, or k or v of its group, `[b, n, U or G, e]`."""
        t = project(self.x, self.projection(which, stage), self.ctx.case.architecture.head_dim)
        return replicate_heads(t, self._copies(which))

    def _copies(self, which: Which) -> int:
        return 1 if which == "q" else self.stages.copies

    def _rows(self, which: Which, parameter: Tensor, stage: Stage) -> Tensor:
        """View what of a weight or bias makes q of a stage, `[G, t, e, ...]`, or k or v of its group, `[k, e, ...]`."""
        s = self.stages
        if which == "q":
            by_head: Tensor = parameter.unflatten(0, (s.num_kv_heads, s.ratio, -1))
            return by_head[stage.group, stage.turn]
        originals: Tensor = parameter.unflatten(0, (s.num_kv_heads // s.copies, -1))
        return originals[s.originals(stage.group)]

    def _o_columns(self, stage: Stage) -> Tensor:
        """Columns of wo of a stage, `[d, U*e]`, a copy."""
        columns: Tensor = self._by_heads(self.weights.wo)[:, stage.group, stage.turn].flatten(1)
        return columns

    def _by_heads(self, weight: Tensor) -> Tensor:
        """View `[d, h*e]` as `[d, KV copy, query head of the copy, e]`."""
        return weight.view(weight.shape[0], self.stages.num_kv_heads, self.stages.ratio, -1)
