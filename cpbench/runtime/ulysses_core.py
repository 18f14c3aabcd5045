"""The core of every method that keeps its projections whole: heads exchanged within a group, K/V passed round a ring.

With both groups of size one it is plain attention; with one of them, Ulysses or ring attention; with both, the hybrid.

Exchanges run beside projections where that costs no memory: v's beside the projection of k, k's beside that of q, and
in backward that of out beside the projection of dout.  Each tensor is given up the moment its last reader has it,
which is why exchanges are called here and not through a method of the core: its frame would hold their argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cpbench.runtime.attention_block import Produce, Saved, Take
from cpbench.runtime.collectives import all_to_all_sequence, start_all_to_all_heads
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
        group, recorder, copies = self.ctx.ulysses, self.ctx.recorder, self.copies
        exchange = start_all_to_all_heads(replicate_heads(produce("v"), copies), group, recorder)
        saved["k"] = produce("k")
        saved["v"] = exchange.wait()
        exchange = start_all_to_all_heads(replicate_heads(saved.pop("k"), copies), group, recorder)
        saved["q"] = produce("q")
        saved["k"] = exchange.wait()
        saved["q"] = start_all_to_all_heads(saved.pop("q"), group, recorder).wait()

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
        """Exchange out and dout, run the kernel, exchange each gradient home and sum it over the copies of a head."""
        group, recorder, copies = self.ctx.ulysses, self.ctx.recorder, self.copies
        exchange = start_all_to_all_heads(saved.pop("out"), group, recorder)
        saved["dout"] = dout()
        saved["out"] = exchange.wait()
        saved["dout"] = start_all_to_all_heads(saved.pop("dout"), group, recorder).wait()
        saved["q"], saved["k"], saved["v"] = self.ring.backward(
            saved.pop("dout"),
            saved.pop("q"),
            saved.pop("k"),
            saved.pop("v"),
            saved.pop("out"),
            saved.pop("lse"),
        )
        take("q", all_to_all_sequence(saved.pop("q"), group, recorder))
        take("k", sum_replicas(all_to_all_sequence(saved.pop("k"), group, recorder), copies))
        take("v", sum_replicas(all_to_all_sequence(saved.pop("v"), group, recorder), copies))

    @property
    def copies(self) -> int:
        """Copies of each KV head."""
        return replicas(self.ctx.case.architecture.num_kv_heads, self.ctx.ulysses.size)

    @property
    def ring(self) -> RingAttention:
        """Attention over the ring."""
        return RingAttention(self.ctx.kernels, self.ctx.ring, self.ctx.scale, self.zigzag)
