"""UPipe (Untied Ulysses, 2026): project, exchange and attend for a few heads at a time, so buffers are stage-sized.

Source: arXiv 2602.21196; the schedule below is the general form of its GQA schedule.
Communication: as Ulysses with un-replicated K/V: forward q, k, v, out; backward q, k, v again, out, dout, dq, dk, dv.
Memory: the attention output and its gradient at full width (M each), everything else for one stage (m = M U/H).
Limits: the degree C divides num_heads; stage_heads U is a multiple of C that divides num_heads; s divisible by the
    ranks (by 2 R C for a ring degree R above 1).

The stages.  K/V heads are handled in groups of G, q heads in stages of U: stage r of a group takes t = U/G query
heads of each of its KV heads, so K/V of a group are projected and sent once and serve all of its stages.  With
replication (fewer KV heads than ranks) "KV head" means a copy.  Heads of a stage are strided rows of the true weight,
so a pretrained checkpoint gives the same function.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpbench.case import Case
from cpbench.errors import Unsupported, UsageError
from cpbench.method import AttentionWeights, Costs, Layout, hybrid_segments
from cpbench.model_config import ModelConfig
from cpbench.runtime.collectives import all_to_all_heads, all_to_all_sequence
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.costs import HeadBytes, sent
from cpbench.runtime.kv_replication import replicas, replicate_heads, sum_replicas
from cpbench.runtime.projection import HeadNorm, project, project_backward
from cpbench.runtime.ring_attention import RingAttention


@dataclass(frozen=True, kw_only=True, slots=True)
class UPipe:
    """Head-chunked Ulysses, alone or with a ring across Ulysses groups."""

    stage_heads: int = 0
    """Query heads of a stage over the whole Ulysses group, U; 0 takes the degree C, the leanest."""
    ring_degree: int = 1
    """Ring ranks R; the Ulysses degree is world_size / R."""

    def __post_init__(self) -> None:
        """Refuse negative sizes."""
        if self.stage_heads < 0:
            raise UsageError(
                f"upipe.stage_heads={self.stage_heads} is negative; use 0 for the Ulysses degree"
            )
        if self.ring_degree < 1:
            raise UsageError(f"upipe.ring_degree={self.ring_degree} must be at least 1")

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
        w = weights
        out: Tensor = _Stages.apply(x, w.wq, w.wk, w.wv, w.q_norm, w.k_norm, ctx, stages)
        return torch.matmul(out.flatten(2), w.wo.t())

    def costs(self, case: Case) -> Costs:
        """Closed forms; M, K' the bytes of all query heads and of all KV copies of the local n = s/W tokens.

        All-to-all over C ranks, B bytes send B (C-1)/C.  Forward moves q, k, v, out as Ulysses does: 2M + 2K'.
        Backward moves q, k, v again, and out, dout, dq, dk, dv: 4M + 4K'.

        Ring over R ranks: every stage sends the K/V of its group, so a group's K/V travel once for each of its g'/t
        stages.  With T = K' g'/t, in bytes: forward 2T (R-1); backward 2T (R-1) + 2 f T R, f = 4 / bytes per element.
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
        return Costs(forward_collective_bytes=forward, backward_collective_bytes=backward)


METHOD = UPipe


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

    def by_copy(self, t: Tensor, *, dim: int) -> Tensor:
        """View a dimension of query heads as [KV copy, query head of the copy]."""
        view: Tensor = t.unflatten(dim, (self.num_kv_heads, self.ratio))
        return view

    def originals(self, group: slice) -> slice:
        """Return the KV heads of the model whose copies make up a group."""
        return slice(group.start // self.copies, group.stop // self.copies)


class _Stages(torch.autograd.Function):
    """Normalised hidden states to the attention output of all heads in true order, `[b, n, h, e]`."""

    @staticmethod
    def forward(
        node: Any,  # noqa: ANN401 - autograd's context has no public type
        x: Tensor,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        ctx: AttentionContext,
        stages: Stages,
    ) -> Tensor:
        block = _StageBlock(x, AttentionWeights(wq, wk, wv, wq, q_norm, k_norm), ctx, stages)
        a = ctx.case.architecture
        out = x.new_empty((*x.shape[:2], a.num_heads, a.head_dim))
        by_copy = stages.by_copy(out, dim=2)
        row_sums: list[Tensor] = []
        for group in stages.groups():
            k, v = block.keys_values(group)
            for turn in stages.turns():
                stage_out, lse = block.ring.forward(block.queries(group, turn), k, v)
                row_sums.append(lse)
                local = all_to_all_sequence(stage_out, ctx.ulysses, ctx.recorder)
                del stage_out
                by_copy[:, :, group, turn] = local.unflatten(2, (stages.group, stages.per_stage))
                del local
            del k, v
        node.save_for_backward(x, wq, wk, wv, q_norm, k_norm, out)
        node.row_sums, node.ctx, node.stages = row_sums, ctx, stages
        return out

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> Any:  # noqa: ANN401 - autograd's context has no public type
        x, wq, wk, wv, q_norm, k_norm, out = node.saved_tensors
        stages: Stages = node.stages
        block = _StageBlock(x, AttentionWeights(wq, wk, wv, wq, q_norm, k_norm), node.ctx, stages)
        sums = block.gradients()
        by_copy, dout_by_copy = stages.by_copy(out, dim=2), stages.by_copy(grads[0], dim=2)
        row_sums = iter(node.row_sums)
        for group in stages.groups():
            k, v = block.keys_values(group)
            dk: Tensor | None = None
            dv: Tensor | None = None
            for turn in stages.turns():
                q = block.queries(group, turn)
                stage_out = block.to_heads(by_copy[:, :, group, turn].flatten(2, 3))
                stage_dout = block.to_heads(dout_by_copy[:, :, group, turn].flatten(2, 3))
                dq, stage_dk, stage_dv = block.ring.backward(stage_dout, q, k, v, stage_out, next(row_sums))
                del q, stage_out, stage_dout
                dk = stage_dk if dk is None else dk.add_(stage_dk)
                dv = stage_dv if dv is None else dv.add_(stage_dv)
                del stage_dk, stage_dv
                block.take_queries(sums, dq, group, turn)
                del dq
            del k, v
            if dk is not None and dv is not None:  # every group has at least one stage
                block.take_keys_values(sums, dk, dv, group)
        return sums.dx, sums.dwq, sums.dwk, sums.dwv, sums.dq_norm, sums.dk_norm, None, None


@dataclass(slots=True)
class _Gradients:
    """Sums over the stages."""

    dx: Tensor
    dwq: Tensor
    dwk: Tensor
    dwv: Tensor
    dq_norm: Tensor | None
    dk_norm: Tensor | None
    empty: bool = True
    """Whether dx holds nothing yet."""


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

    def to_heads(self, t: Tensor) -> Tensor:
        return all_to_all_heads(t, self.ctx.ulysses, self.ctx.recorder)

    def keys_values(self, group: slice) -> tuple[Tensor, Tensor]:
        """K/V of a group in head layout, `[b, s/R, G/C, e]`."""
        copies, e = self.stages.copies, self.ctx.case.architecture.head_dim
        wk, wv = self._kv_rows(self.weights.wk, group), self._kv_rows(self.weights.wv, group)
        v = self.to_heads(replicate_heads(project(self.x, wv, e), copies))
        k = self.to_heads(
            replicate_heads(project(self.x, wk, e, norm=self._norms()[1], rope=self.ctx.rope), copies)
        )
        return k, v

    def queries(self, group: slice, turn: slice) -> Tensor:
        """Queries of a stage in head layout, `[b, s/R, U/C, e]`."""
        e = self.ctx.case.architecture.head_dim
        weight = self._q_rows(self.weights.wq)[group, turn].reshape(-1, self.x.shape[-1])
        return self.to_heads(project(self.x, weight, e, norm=self._norms()[0], rope=self.ctx.rope))

    def gradients(self) -> _Gradients:
        """Buffers for the sums over the stages."""
        w = self.weights
        sums = _Gradients(
            torch.empty_like(self.x),
            torch.empty_like(w.wq),
            torch.empty_like(w.wk),
            torch.empty_like(w.wv),
            None if w.q_norm is None else torch.zeros_like(w.q_norm, dtype=torch.float32),
            None if w.k_norm is None else torch.zeros_like(w.k_norm, dtype=torch.float32),
        )
        self.ctx.recorder.mark("attention_input_gradient", sums.dx)
        self.ctx.recorder.mark("weight_gradient", sums.dwq, sums.dwk, sums.dwv, sums.dq_norm, sums.dk_norm)
        return sums

    def take_queries(self, sums: _Gradients, dq: Tensor, group: slice, turn: slice) -> None:
        """Add a stage's dq to the gradients."""
        weight = self._q_rows(self.weights.wq)[group, turn].reshape(-1, self.x.shape[-1])
        dw, dnorm = self._back(sums, dq, weight, self._norms()[0], 1, rotated=True)
        self._q_rows(sums.dwq)[group, turn] = dw.view(
            self.stages.group, self.stages.per_stage, -1, dw.shape[-1]
        )
        if sums.dq_norm is not None and dnorm is not None:
            sums.dq_norm += dnorm

    def take_keys_values(self, sums: _Gradients, dk: Tensor, dv: Tensor, group: slice) -> None:
        """Add a group's dk and dv to the gradients."""
        copies = self.stages.copies
        dw, dnorm = self._back(
            sums, dk, self._kv_rows(self.weights.wk, group), self._norms()[1], copies, rotated=True
        )
        self._kv_rows(sums.dwk, group).copy_(dw)
        if sums.dk_norm is not None and dnorm is not None:
            sums.dk_norm += dnorm
        dw, _ = self._back(sums, dv, self._kv_rows(self.weights.wv, group), None, copies, rotated=False)
        self._kv_rows(sums.dwv, group).copy_(dw)

    def _back(
        self,
        sums: _Gradients,
        grad: Tensor,
        weight: Tensor,
        norm: HeadNorm | None,
        copies: int,
        *,
        rotated: bool,
    ) -> tuple[Tensor, Tensor | None]:
        local = all_to_all_sequence(grad, self.ctx.ulysses, self.ctx.recorder)
        local = sum_replicas(local, copies)
        rope = self.ctx.rope if rotated else None
        result = project_backward(local, self.x, weight, sums.dx, norm=norm, rope=rope, first=sums.empty)
        sums.empty = False
        return result

    def _norms(self) -> tuple[HeadNorm | None, HeadNorm | None]:
        return self.ctx.head_norms(self.weights)

    def _q_rows(self, weight: Tensor) -> Tensor:
        """View `[h*e, d]` as `[KV copy, query head of the copy, e, d]`."""
        return weight.view(self.stages.num_kv_heads, self.stages.ratio, -1, weight.shape[-1])

    def _kv_rows(self, weight: Tensor, group: slice) -> Tensor:
        """View the rows `[(G/copies)*e, d]` of a group's KV heads."""
        e, heads = self.ctx.case.architecture.head_dim, self.stages.originals(group)
        return weight[heads.start * e : heads.stop * e]
