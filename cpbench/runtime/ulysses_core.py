"""The core of every method that keeps its projections whole: heads exchanged within a group, K/V passed round a ring.

With both groups of size one it is plain attention; with one of them, Ulysses or ring attention; with both, the hybrid.

Exchanges run beside projections where that costs no memory: v's beside the projection of k, k's beside that of q, and
in backward that of out beside the projection of dout.  Each tensor is given up the moment its last reader has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cpbench.runtime.attention_block import Produce, Saved, Take
from cpbench.runtime.collectives import HeadsPending, all_to_all_sequence, start_all_to_all_heads
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.kv_replication import replicas, replicate_heads, sum_replicas
from cpbench.runtime.ring_attention import RingAttention


@dataclass(frozen=True, slots=True)
class UlyssesCore:
    """See `cpbench.runtime.attention_block.Core`."""

    ctx: AttentionContext
    zigzag: bool = True
    """Whether a ring rank holds an early and a late chunk; without meaning in a ring of one."""

    def inputs(self, produce: Produce, saved: Saved) -> None:
        """Project and exchange v, k and q, `[b, n, h, e] -> [b, s/R, h/C, e]`."""
        copies = self.copies
        exchange = self.start(replicate_heads(produce("v"), copies))
        saved["k"] = produce("k")
        saved["v"] = exchange.wait()
        exchange = self.start(replicate_heads(saved.pop("k"), copies))
        saved["q"] = produce("q")
        saved["k"] = exchange.wait()
        saved["q"] = self.start(saved.pop("q")).wait()

    def attend(self, saved: Saved, *, keep: bool) -> None:
        """Attention of h/C heads with the keys of the ring."""
        if keep:
            out, lse = self.ring.forward(saved["q"], saved["k"], saved["v"])
        else:
            out, lse = self.ring.forward(saved.pop("q"), saved.pop("k"), saved.pop("v"))
        saved["out"], saved["lse"] = out, lse

    def output(self, saved: Saved) -> None:
        """Exchange out, `[b, s/R, h/C, e] -> [b, n, h, e]`."""
        saved["out"] = all_to_all_sequence(saved.pop("out"), self.ctx.ulysses, self.ctx.recorder)

    def backward(self, saved: Saved, dout: Callable[[], Tensor], take: Take) -> None:
        """Exchange out and dout, run the kernel, exchange each gradient home."""
        exchange = self.start(saved.pop("out"))
        saved["dout"] = dout()
        saved["out"] = exchange.wait()
        saved["dout"] = self.start(saved.pop("dout")).wait()
        saved["q"], saved["k"], saved["v"] = self.ring.backward(
            saved.pop("dout"),
            saved.pop("q"),
            saved.pop("k"),
            saved.pop("v"),
            saved.pop("out"),
            saved.pop("lse"),
        )
        take("q", self.home(saved.pop("q"), 1))
        take("k", self.home(saved.pop("k"), self.copies))
        take("v", self.home(saved.pop("v"), self.copies))

    def home(self, grad: Tensor, copies: int) -> Tensor:
        """Exchange a gradient, `[b, s/R, h/C, e] -> [b, n, h, e]`, and sum it over the copies of each head."""
        return sum_replicas(all_to_all_sequence(grad, self.ctx.ulysses, self.ctx.recorder), copies)

    def start(self, t: Tensor) -> HeadsPending:
        """Start to exchange sequence for heads."""
        return start_all_to_all_heads(t, self.ctx.ulysses, self.ctx.recorder)

    @property
    def copies(self) -> int:
        """Copies of each KV head."""
        return replicas(self.ctx.case.architecture.num_kv_heads, self.ctx.ulysses.size)

    @property
    def ring(self) -> RingAttention:
        """Attention over the ring."""
        return RingAttention(self.ctx.kernels, self.ctx.ring, self.ctx.scale, self.zigzag)
