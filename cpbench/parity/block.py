"""One attention block over the ranks: its output and all gradients at full size on rank 0, and what it sent."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from cpbench.case import Case
from cpbench.errors import CpbenchError
from cpbench.method import AttentionWeights, Method
from cpbench.parity.ranks import Ranks
from cpbench.parity.reference import NO_WEIGHTS
from cpbench.runtime.collectives import CollectiveLog
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.host_pool import HostPool
from cpbench.runtime.kernels import select_kernels
from cpbench.runtime.memo import Memo
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.rope import Rope
from cpbench.runtime.streams import Streams

Surroundings = Literal["plain", "checkpoint", "attention saved"]
"""plain: forward, backward.  checkpoint: forward, recomputation, backward, as in a checkpointed stack.  attention
saved: the same, and the stack asks that the attention output be kept in host memory."""


def parts_tile(case: Case) -> int:
    """Return the elements of a tile of parts with which the smallest case has several, the last one shorter."""
    rows = case.batch_size * case.tokens_per_rank
    return case.architecture.attention_dim * -(-2 * rows // 5)


@dataclass(slots=True)
class BlockRun:
    """What came of one run; `tensors` are right on rank 0 only."""

    tensors: dict[str, Tensor]
    """`out`, `dx`, `dwq`, ... at full size, summed over the ranks, in float32."""
    forward: CollectiveLog = field(default_factory=CollectiveLog)
    """Collectives of this rank in the first forward."""
    backward: CollectiveLog = field(default_factory=CollectiveLog)
    """In the backward, without the checkpoint's recomputation."""


class Block:
    """One method's attention block at one shape."""

    def __init__(self, case: Case, method: Method, ranks: Ranks) -> None:
        """Prepare; groups of ranks are made here, so every rank must.

        Args:
            case: resolved.
            method: of the case.
            ranks: that share the sequence.
        """
        layout = method.layout(case, ranks.rank)
        ulysses, ring = ranks.groups(layout)
        recorder = Recorder()
        self.case, self.method, self.ranks = case, method, ranks
        self.positions = torch.cat([torch.arange(start, stop) for start, stop in layout.segments])
        """Global positions of this rank's tokens, in local order."""
        self.positions = self.positions.to(ranks.device)
        self.ctx = AttentionContext(
            case=case,
            ulysses=ulysses,
            ring=ring,
            kernels=select_kernels(case),
            rope=Rope(layout.segments, case.architecture.rope_theta),
            recorder=recorder,
            host=HostPool(ranks.device, Streams(ranks.device), recorder),
            parts_tile=parts_tile(case),
        )

    def run(self, inputs: dict[str, Tensor], surroundings: Surroundings = "plain") -> BlockRun:
        """Run forward and backward and put the ranks' results together.

        Args:
            inputs: at full size, as `cpbench.parity.reference.make_inputs` makes them.
            surroundings: what is around the block.

        Raises:
            CpbenchError: an input has no gradient.
        """
        leaves = self._leaves(inputs)
        names, values = list(leaves), list(leaves.values())
        run = BlockRun({})
        ctx = self.ctx
        if surroundings != "plain":
            memo = Memo(ctx.host, save_attention=surroundings == "attention saved")
            ctx = replace(ctx, memo=memo)
            with torch.no_grad(), self.ranks.counting(run.forward):
                # The stack writes the MLP over the output; a method that needs it later would see this.
                self._attention(leaves, ctx).fill_(torch.nan)
            memo.recomputing = True
        y = self._attention(leaves, ctx)
        out = y.detach().clone()
        y.detach().fill_(torch.nan)
        edge = get_gradient_edge(y)
        del y
        dy = inputs["dout"][:, self.positions].contiguous()
        with self.ranks.counting(run.backward):
            grads = torch.autograd.grad([edge], values, [dy], allow_unused=True)
        missing = [name for name, grad in zip(names, grads, strict=True) if grad is None]
        if missing:
            raise CpbenchError(f"the method gives no gradient for {', '.join(missing)}")
        found = {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}
        found |= {"out": self._spread(out), "dx": self._spread(found["dx"])}
        run.tensors = self.ranks.sum(found)
        return run

    def local_output(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return this rank's rows of the output, `[b, n, d]`."""
        return self._attention(self._leaves(inputs), self.ctx).detach()

    def local_input_gradient(self, inputs: dict[str, Tensor], dout: Tensor) -> Tensor:
        """Return this rank's rows of dx for an output gradient of full size."""
        leaves = self._leaves(inputs)
        y = self._attention(leaves, self.ctx)
        (dx,) = torch.autograd.grad(y, [leaves["x"]], dout[:, self.positions].contiguous())
        return dx

    def _attention(self, leaves: dict[str, Tensor], ctx: AttentionContext) -> Tensor:
        weights = AttentionWeights(**{name: t for name, t in leaves.items() if name != "x"})
        return self.method.attention(leaves["x"], weights, ctx)

    def _leaves(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        local = {"x": inputs["x"][:, self.positions]}
        local |= {name: t for name, t in inputs.items() if name not in NO_WEIGHTS}
        return {name: t.detach().clone().requires_grad_() for name, t in local.items()}

    def _spread(self, local: Tensor) -> Tensor:
        """This rank's rows at their global positions, so that a row held twice or by no one shows as an error."""
        full = torch.zeros(local.shape[0], self.case.seq_len, local.shape[2], device=local.device)
        full[:, self.positions] = local.float()
        return full
