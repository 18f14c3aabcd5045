"""FPDT (Yao et al., 2024): Ulysses in sequence chunks that wait in host memory, so the device holds a few chunks.

Source: arXiv 2408.16978.  Differences from its published code: no barriers and no host synchronisation; RoPE before
the all-to-all, in place; the output projection and dx chunk by chunk into their buffers, so that the full attention
output and its gradient never exist; causal float32 merges in place; backward by query chunks (below); one sequence of
a batch after another, as they share nothing.
Communication: as Ulysses: forward q, k, v and out; backward out, dout, dq, dk, dv.
Memory: with c the bytes of one chunk's queries and 4 of them to a KV head, 5 c in forward and 13.5 c in backward,
whatever the length; nothing of full width but x, y, dy, dx.  Host: 2 K' of one sequence in the first forward; from
recomputation to backward 2 M + 2 K', and float32 dK, dV of one sequence; without checkpointing that of every block.
Limits: num_heads divisible by the ranks C; s divisible by the chunk, and the chunk by C.

Layout.  Chunk i of all ranks together is the i-th contiguous range of the sequence, so a rank's local chunk i becomes,
by one all-to-all, T contiguous tokens with H/C heads.  Queries of chunk i meet keys of chunks j <= i: their own first,
which are on the device, then the earlier ones from host memory, the next on its way while one is computed.

The order of the backward.  With keys outside and queries inside (as published), every pair of chunks moves q, out, dout
in and float32 dq in and out: 3 c + 2 c + 2 c in bfloat16.  With queries outside, every pair moves k, v in and float32
dk, dv in and out: (2 + 4 + 4) c / g for g query heads a KV head.  That is 10 c / g instead of 7 c: less for every GQA
(2.5 c for g = 4), and for MHA 6 c in and 4 c out instead of 5 c in and 2 c out.  It needs fewer buffers too: q, out,
dout and dq stay for a row, and what is double-buffered has the KV heads' width.  A pair computes T g / 2 FLOP for each
of these bytes, 128K for T = 64K and g = 4.  In all a backward moves 10 c / g N (N-1) / 2 bytes, and N (2 c + 2 c / g)
that a row reads once; a forward moves 2 c / g N (N-1) / 2 in, and out what it keeps.

What waits for backward in host memory: q, k, v, out and log-sum-exp of every chunk.  To compute q, k, v again would
cost an all-to-all, to compute out again a forward, and the link is idle when they leave.  In the first forward of a
checkpointed block nothing is kept, or with `save_attention` out and log-sum-exp; then backward projects and exchanges
q, k, v again (M + 2K' more to send), each chunk just before its row.

Weight gradients are sums over chunks, in float32, of products in the compute dtype; they and one product (weight-sized)
live during backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from cpbench.case import Case
from cpbench.errors import Unsupported, UsageError
from cpbench.method import ATTENTION_WEIGHTS, AttentionWeights, Costs, Layout
from cpbench.runtime.collectives import all_to_all_heads, all_to_all_sequence
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.costs import HeadBytes, sent
from cpbench.runtime.host_pool import HostPool, Stored
from cpbench.runtime.kernels import scratch_of, select_kernels
from cpbench.runtime.kv_replication import replicas, replicate_heads, sum_replicas
from cpbench.runtime.memo import Memo
from cpbench.runtime.projection import Projection, Which, project, project_backward
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.tiles import growing_rows, tiles

_TILE_ELEMENTS = 2**20  # rows of a merge tile are chosen so that its float32 temporary stays at 4 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class Fpdt:
    """Chunked Ulysses with double-buffered host memory."""

    chunk_tokens: int = 65536
    """Tokens of a chunk over all ranks, T, as published; 0, or the whole sequence and more, makes one chunk."""

    def __post_init__(self) -> None:
        """Refuse a negative size."""
        if self.chunk_tokens < 0:
            raise UsageError(f"fpdt.chunk_tokens={self.chunk_tokens} is negative; use 0 for one chunk")

    def check(self, case: Case) -> None:
        """Refuse heads, lengths and chunks that do not divide."""
        heads, ranks, length = case.architecture.num_heads, case.world_size, case.seq_len
        if heads % ranks:
            allowed = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            raise Unsupported(
                f"fpdt: num_heads={heads} is not divisible by world_size={ranks}; "
                f"use a world size of {', '.join(allowed)}, or method ring"
            )
        if length % ranks:
            raise Unsupported(
                f"fpdt: seq_len={length} is not divisible by world_size={ranks}; "
                f"use a multiple of {ranks}, for example {_either(_multiples(length, ranks))}"
            )
        chunk = self._chunk(case)
        nearest = f"fpdt.chunk_tokens={_either(_chunk_sizes(length, ranks, chunk))} (0: one chunk)"
        if chunk % ranks:
            raise Unsupported(
                f"fpdt: chunk_tokens={chunk} is not divisible by world_size={ranks}; use {nearest}"
            )
        if length % chunk:
            raise Unsupported(
                f"fpdt: seq_len={length} is not divisible by chunk_tokens={chunk}; "
                f"use seq_len={_either(_multiples(length, chunk))}, or {nearest}"
            )

    def layout(self, case: Case, rank: int) -> Layout:
        """One range a chunk: the rank's part of each."""
        chunk = self._chunk(case)
        tokens = chunk // case.world_size
        starts = range(rank * tokens, case.seq_len, chunk)
        segments = tuple((start, start + tokens) for start in starts)
        return Layout(ulysses_degree=case.world_size, ring_degree=1, segments=segments)

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """Attention chunk by chunk; see `cpbench.method.Method.attention`."""
        keeps = torch.is_grad_enabled() if ctx.memo is None else ctx.memo.recomputing
        return _Block.apply(x, ctx, keeps, *weights.tensors())  # type: ignore[no-any-return]

    def costs(self, case: Case) -> Costs:
        """Closed forms for C ranks, N chunks; M, K' the bytes of all query heads and all KV copies of n = s/C tokens.

        An all-to-all of B bytes over C ranks sends B (C-1)/C.  Forward moves q, k, v, out: 2M + 2K'.  Backward moves
        out, dout, dq, dk, dv: 3M + 2K'.

        Peaks, for one sequence.  c and c' are the bytes of a chunk's queries and of its keys (c' = K'/N), l those of
        its log-sum-exp, f = 4 / bytes per element, so that f c is c in float32; S what the kernel takes inside.

        Forward, at the kernel of earlier keys: q c, the sum f c, a part of it c, k and v 2 c', the next ones 2 c'
        (N > 2), two log-sum-exps: **(2+f) c + (4 or 2) c' + 2 l + S**.  The kernel of a chunk's own keys comes before,
        with q, out, own and next k, v, which is less; for N = 1 it is all: **2 c + 2 c' + l + S**.

        Backward, at the kernel of earlier keys: q, out, dout 3 c, the sum of dq f c, a part of it c, k, v and parts of
        dk, dv 4 c', the sums of dk, dv on their way to the device 2 f c'.  The next k, v add 2 c' from row three on.
        On cuda the sums of the pair before are leaving, 2 f c' more, but in the last row, where they are complete:
        **(4+f) c + (4 + 2 f + p) c' + l + S** with p = 0 for N = 2, the larger of 2 and 2 f for N = 3, 2 + 2 f above
        (on cpu 0, 2, 2).  For N = 1: **4 c + 4 c' + l + S**.  On cpu, from N = 4 on, a row's own sums leave after the
        reads of its first pair, before there are parts: **(3+f) c + (4 + 4 f) c' + l** may be more, without GQA and
        in bfloat16.
        """
        ranks, a = case.world_size, case.architecture
        copies = replicas(a.num_kv_heads, ranks)
        size = HeadBytes.of(case, tokens=case.tokens_per_rank)
        kv = size.kv * copies
        forward = 2 * sent(size.q, ranks) + 2 * sent(kv, ranks)
        backward = 3 * sent(size.q, ranks) + 2 * sent(kv, ranks)
        return Costs(
            forward_collective_bytes={"all_to_all": forward} if ranks > 1 else {},
            backward_collective_bytes={"all_to_all": backward} if ranks > 1 else {},
            forward_peak_bytes=self._peak(case, backward=False),
            backward_peak_bytes=self._peak(case, backward=True),
        )

    def _peak(self, case: Case, *, backward: bool) -> int:
        """Peak bytes; the derivation is in `costs`."""
        ranks, a, chunk = case.world_size, case.architecture, self._chunk(case)
        count = case.seq_len // chunk
        one = HeadBytes.of(case.model_copy(update={"batch_size": 1}), tokens=chunk // ranks)
        copies = replicas(a.num_kv_heads, ranks)
        q, k, wide = one.q, one.kv * copies, 4 // one.element
        lse = 4 * chunk * a.num_heads // ranks
        scratch = scratch_of(
            select_kernels(case).name,
            (1, chunk, a.num_heads // ranks, a.head_dim),
            (1, chunk, a.num_kv_heads * copies // ranks, a.head_dim),
            one.element,
            backward=backward,
        )
        if not backward:
            merged = (2 + wide) * q + (4 if count > 2 else 2) * k + 2 * lse
            return scratch + (merged if count > 1 else 2 * q + 2 * k + lse)
        if count == 1:
            return 4 * q + 4 * k + lse + scratch
        leaving = 2 * wide if case.device == "cuda" else 0
        extra = {2: 0, 3: max(2, leaving)}.get(count, 2 + leaving)
        peak = (4 + wide) * q + (4 + 2 * wide + extra) * k + lse + scratch
        if count > 3 and not leaving:
            peak = max(peak, (3 + wide) * q + (4 + 4 * wide) * k + lse)
        return peak

    def _chunk(self, case: Case) -> int:
        """Tokens of a chunk over all ranks."""
        return min(self.chunk_tokens or case.seq_len, case.seq_len)


METHOD = Fpdt
VERIFY_OPTIONS = ({"chunk_tokens": 12}, {"chunk_tokens": 24}, {"chunk_tokens": 36})


def _multiples(number: int, of: int) -> list[int]:
    """Return the multiples nearest to a number, below (if above zero) and above."""
    below = number // of * of
    return [n for n in (below, below + of) if n]


def _chunk_sizes(length: int, ranks: int, wanted: int) -> list[int]:
    """Return the allowed chunk sizes nearest to a wanted one, below and above."""
    tokens = length // ranks
    small = [n for n in range(1, isqrt(tokens) + 1) if tokens % n == 0]
    sizes = sorted({n * ranks for n in (*small, *(tokens // n for n in small))})
    return [n for n in sizes if n < wanted][-1:] + [n for n in sizes if n > wanted][:1]


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(str(n) for n in numbers)


KeyValue = tuple[Stored, Stored]


class _Block(torch.autograd.Function):
    """Normalised hidden states to the block's output."""

    @staticmethod
    def forward(
        node: Any,  # noqa: ANN401 - autograd's context has no public type
        x: Tensor,
        ctx: AttentionContext,
        keeps: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        memo = ctx.memo or Memo(ctx.host)
        weights = AttentionWeights.of(tensors)
        block = _Chunks(x, weights, ctx)
        y = x.new_empty((*x.shape[:2], weights.wo.shape[0]))
        if _name("out", (0, 0)) in memo:
            _forward_from_memo(block, memo, y)
            node.projected = []
        else:
            node.projected = _forward(block, memo, y, keeps=keeps)
        node.save_for_backward(x, *tensors)
        node.memo, node.ctx = memo, ctx
        return y

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> Any:  # noqa: ANN401 - autograd's context has no public type
        x, *tensors = node.saved_tensors
        ctx: AttentionContext = node.ctx
        projected: list[_Projected] = node.projected
        memo, node.memo, node.projected = node.memo, None, None
        dx = torch.empty_like(x)
        ctx.recorder.mark("attention_input_gradient", dx)
        sums = {name: _Sum(ctx.recorder) for name in ATTENTION_WEIGHTS}
        block = _Chunks(x, AttentionWeights.of(tensors), ctx)
        for sequence in range(x.shape[0]):
            waiting = projected[sequence] if projected else _Projected()
            _Backward(block, memo, grads[0], dx, sums, sequence, waiting).run()
        return dx, None, None, *(total.take(x.dtype) for total in sums.values())


@dataclass(slots=True)
class _Projected:
    """Chunks of one sequence in host memory, in head layout; those not projected yet are missing."""

    q: dict[int, Stored] = field(default_factory=dict)
    kv: dict[int, KeyValue] = field(default_factory=dict)

    def load(self, chunk: int, host: HostPool) -> None:
        """Start to bring a chunk's keys and values back."""
        for stored in self.kv[chunk]:
            host.prefetch(stored)

    def read(self, chunk: int, host: HostPool) -> tuple[Tensor, Tensor]:
        """Return k and v of a chunk; they stay in host memory too."""
        k, v = self.kv[chunk]
        return host.read(k), host.read(v)

    def drop(self, host: HostPool) -> None:
        """Give keys and values back; a fetch of the queries has done so."""
        for stored in chain.from_iterable(self.kv.values()):
            host.drop(stored)
        self.kv.clear()


@dataclass(slots=True)
class _Sum:
    """A weight gradient: a float32 sum over chunks, unless there is only one."""

    recorder: Recorder
    total: Tensor | None = None

    def add(self, part: Tensor) -> None:
        """Add a chunk's part."""
        self.recorder.mark("weight_gradient", part)
        self.total = part if self.total is None else self.total.float().add_(part)
        self.recorder.mark("weight_gradient", self.total)

    def take(self, dtype: torch.dtype) -> Tensor | None:
        """Return the sum and give it up."""
        total, self.total = self.total, None
        return None if total is None else total.to(dtype)


Place = tuple[int, int]
"""A sequence of the batch, and a chunk of it."""


def _name(what: str, place: Place) -> str:
    return f"{what}:{place[0]}:{place[1]}"


@dataclass(frozen=True, slots=True)
class _Chunks:
    """The parts of a block that forward and backward share."""

    x: Tensor
    weights: AttentionWeights
    ctx: AttentionContext

    @property
    def tokens(self) -> int:
        """A chunk's tokens on this rank, T/C."""
        start, stop = self.ctx.rope.segments[0]
        return stop - start

    @property
    def count(self) -> int:
        """Chunks of a sequence, N."""
        return int(self.x.shape[1]) // self.tokens

    def places(self) -> Iterator[Place]:
        """Yield every chunk, those of a sequence in order; an estimate leaves some out."""
        for sequence in range(self.x.shape[0]):
            for chunk in growing_rows(self.count):
                yield sequence, chunk

    def part(self, t: Tensor, place: Place) -> Tensor:
        """View one chunk of `[b, n, d]`, `[1, T/C, d]`."""
        sequence, start = place[0], place[1] * self.tokens
        return t.narrow(0, sequence, 1).narrow(1, start, self.tokens)

    def project(
        self, place: Place, projected: _Projected, *, keeps_q: bool, keeps_kv: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v of a chunk in head layout, `[1, T, h/C, e]`; each leaves while the next is projected."""
        host = self.ctx.host
        v = self._heads("v", place)
        stored = host.store(v) if keeps_kv else None
        k = self._heads("k", place)
        if stored is not None:
            projected.kv[place[1]] = host.store(k), stored
        q = self._heads("q", place)
        if keeps_q:
            projected.q[place[1]] = host.store(q)
        return q, k, v

    def _heads(self, which: Which, place: Place) -> Tensor:
        head_dim = self.ctx.case.architecture.head_dim
        t = [project(self.part(self.x, place), self.projection(which, place), head_dim)]
        if which != "q":
            t.append(replicate_heads(t.pop(), self.copies))
        return all_to_all_heads(t.pop(), self.ctx.ulysses, self.ctx.recorder)

    def project_output(self, out: Tensor, y: Tensor, place: Place) -> None:
        """Write one chunk of y from its attention output `[1, T/C, h, e]`."""
        torch.mm(out.flatten(2)[0], self.weights.wo.t(), out=self.part(y, place)[0])

    def projection(self, which: Which, place: Place) -> Projection:
        """Return one of a chunk's projections."""
        whole = self.ctx.projections(self.weights)[which]
        if whole.rope is None:
            return whole
        return replace(whole, rope=replace(whole.rope, segments=whole.rope.segments[place[1] : place[1] + 1]))

    @property
    def copies(self) -> int:
        """Copies of each KV head."""
        return replicas(self.ctx.case.architecture.num_kv_heads, self.ctx.ulysses.size)


def _forward(block: _Chunks, memo: Memo, y: Tensor, *, keeps: bool) -> list[_Projected]:
    """Write the block's output; if backward follows, leave out and log-sum-exp in the memo and return q, k, v."""
    ctx = block.ctx
    kept = [_Projected() for _ in range(y.shape[0])]
    for place in block.places():
        projected = kept[place[0]]
        found = _attend(block, place, projected, keeps=keeps)
        out = all_to_all_sequence(found.pop("out"), ctx.ulysses, ctx.recorder)
        block.project_output(out, y, place)
        if keeps or memo.save_attention:
            memo.put(_name("out", place), out)
            # Last, because the pool holds on to what is put last, and this is small.
            memo.put(_name("lse", place), found.pop("lse"))
        del out, found
        if place[1] + 1 == block.count and not keeps:
            projected.drop(ctx.host)
    return kept if keeps else []


def _forward_from_memo(block: _Chunks, memo: Memo, y: Tensor) -> None:
    """Write the block's output from the attention output that an earlier forward left; it stays for backward."""
    before: Place | None = None
    for place in block.places():
        memo.prefetch(_name("out", place))
        if before is not None:
            block.project_output(memo.read(_name("out", before)), y, before)
        before = place
    if before is not None:
        block.project_output(memo.read(_name("out", before)), y, before)


def _attend(block: _Chunks, place: Place, projected: _Projected, *, keeps: bool) -> dict[str, Tensor]:
    """Return `out`, `[1, T, h/C, e]`, and `lse` of a chunk's queries."""
    kernels, scale, host, chunk = block.ctx.kernels, block.ctx.scale, block.ctx.host, place[1]
    if chunk > 1:  # the chunk before may still be leaving, and only a read waits for that
        projected.load(0, host)
    keeps_kv = keeps or chunk + 1 < block.count
    q, k, v = block.project(place, projected, keeps_q=keeps, keeps_kv=keeps_kv)
    out, lse = kernels.forward(q, k, v, causal=True, scale=scale)
    del k, v
    if chunk > 0:
        out = out.float()
    for j, following in _earlier(chunk):
        if following is not None:
            projected.load(following, host)
        k, v = projected.read(j, host)
        part, part_lse = kernels.forward(q, k, v, causal=False, scale=scale)
        del k, v
        _merge_(out, lse, part, part_lse)
        del part, part_lse
    del q
    return {"out": out.to(block.x.dtype), "lse": lse}


def _earlier(chunk: int) -> Iterator[tuple[int, int | None]]:
    """Yield every chunk before one, and the chunk to load meanwhile; an estimate yields the first few of them."""
    last = 0
    for keys in tiles(chunk - 1, 1):
        yield keys.start, keys.stop
        last = keys.stop
    if chunk > 0:
        yield last, None


@dataclass(slots=True)
class _Backward:
    """The backward of one sequence, a row of query chunks after the other."""

    block: _Chunks
    memo: Memo
    dy: Tensor
    dx: Tensor
    weights: dict[str, _Sum]
    sequence: int
    projected: _Projected
    dkv: dict[int, Stored] = field(default_factory=dict)
    """Sums of dk and dv of the chunks so far, `[2, 1, T, k/C, e]` float32."""

    def run(self) -> None:
        """Write dx and add to the weights' gradients."""
        for chunk in growing_rows(self.block.count):
            self._take("q", chunk, self._row(chunk), first=chunk + 1 < self.block.count)
        host = self.block.ctx.host
        self.projected.drop(host)
        for stored in self.dkv.values():
            host.drop(stored)

    def _row(self, chunk: int) -> Tensor:
        """Return dq of a chunk, `[1, T, h/C, e]`.

        The sums of a pair load while its kernel runs, and leave while the next one does.
        """
        ctx, host = self.block.ctx, self.block.ctx.host
        dout, q, k, v, out, lse = self._start(chunk)
        dq, dk, dv = ctx.kernels.backward(dout, q, k, v, out, lse, causal=True, scale=ctx.scale)
        del k, v
        if chunk > 0:
            dq = dq.float()
        last = chunk + 1 == self.block.count
        leaving: tuple[int, Tensor] | None = None
        if last:
            self._take("k", chunk, dk, first=True)
            self._take("v", chunk, dv)
        else:
            dkv = torch.empty((2, *dk.shape), dtype=torch.float32, device=dk.device)
            dkv[0], dkv[1] = dk, dv
            leaving = chunk, dkv
            del dkv
        del dk, dv
        for j, following in _earlier(chunk):
            host.prefetch(self.dkv[j])
            if following is not None:
                self.projected.load(following, host)
            k, v = self.projected.read(j, host)
            self._store(leaving)  # after the reads, which would make the kernel wait for it
            leaving = None
            part, dk, dv = ctx.kernels.backward(dout, q, k, v, out, lse, causal=False, scale=ctx.scale)
            del k, v
            dq += part
            del part
            dkv = host.read(self.dkv[j])
            dkv[0] += dk
            dkv[1] += dv
            del dk, dv
            if last:
                self._take("k", j, dkv[0])
                self._take("v", j, dkv[1])
            else:
                leaving = j, dkv
            del dkv
        self._store(leaving)
        return dq

    def _start(self, chunk: int) -> tuple[Tensor, ...]:
        """Return dout, q, k, v, out, lse of a row in head layout, its own keys first; give wo its gradient."""
        block, ctx, memo, host = self.block, self.block.ctx, self.memo, self.block.ctx.host
        place = self.sequence, chunk
        memo.prefetch(_name("out", place))
        waits = chunk in self.projected.q
        if waits:
            host.prefetch(self.projected.q[chunk])
            self.projected.load(chunk, host)
        if chunk > 0:
            self.projected.load(0, host)
        dy = block.part(self.dy, place)
        saved = {"out": memo.take(_name("out", place))}
        memo.prefetch(_name("lse", place))  # after a read, because with one chunk it is what left last
        self.weights["wo"].add(dy[0].t() @ saved["out"].flatten(2)[0])
        out = all_to_all_heads(saved.pop("out"), ctx.ulysses, ctx.recorder)
        saved["dout"] = (dy @ block.weights.wo).unflatten(-1, (-1, ctx.case.architecture.head_dim))
        dout = all_to_all_heads(saved.pop("dout"), ctx.ulysses, ctx.recorder)
        lse = memo.take(_name("lse", place))
        if waits:
            q, (k, v) = host.fetch(self.projected.q[chunk]), self.projected.read(chunk, host)
        else:
            keeps_kv = chunk + 1 < block.count
            q, k, v = block.project(place, self.projected, keeps_q=False, keeps_kv=keeps_kv)
        return dout, q, k, v, out, lse

    def _store(self, leaving: tuple[int, Tensor] | None) -> None:
        """Put the sums of a chunk into host memory."""
        if leaving is None:
            return
        chunk, dkv = leaving
        if chunk in self.dkv:
            self.block.ctx.host.overwrite(self.dkv[chunk], dkv)
        else:
            self.dkv[chunk] = self.block.ctx.host.store(dkv)

    def _take(self, which: Which, chunk: int, grad: Tensor, *, first: bool = False) -> None:
        """Turn a chunk's gradient of q, k or v in head layout into those of x and of the weights."""
        block, place = self.block, (self.sequence, chunk)
        grad = grad.to(self.dx.dtype)
        grad = all_to_all_sequence(grad, block.ctx.ulysses, block.ctx.recorder)
        if which != "q":
            grad = sum_replicas(grad, block.copies)
        x, dx = block.part(block.x, place), block.part(self.dx, place)
        d = project_backward(grad, x, block.projection(which, place), dx, first=first)
        for name, part in d.named(which).items():
            if part is not None:
                self.weights[name].add(part)


def _merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge attention over other keys into `out` `[1, T, h, e]` float32 and `lse`, in place.

    With w = exp(l2) / (exp(l1) + exp(l2)):  out <- out + w (part - out),  lse <- log(exp(l1) + exp(l2)).
    """
    _b, s, h, e = part.shape
    weight = torch.sigmoid(part_lse - lse).transpose(1, 2).unsqueeze(-1)  # [1, T, h, 1]
    for tile in tiles(s, _TILE_ELEMENTS // (h * e)):
        rows = 1, tile.start, tile.stop - tile.start
        merged = out.narrow(*rows)
        merged.addcmul_(part.narrow(*rows) - merged, weight.narrow(*rows))
    torch.logaddexp(lse, part_lse, out=lse)
