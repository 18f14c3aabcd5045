"""The attention block around a core: projections, the core between q, k, v and the output, output projection.

Methods that do not chunk the projections (`single`, `ring`, `ulysses`, ...) give only a *core*.  The core asks for
its inputs when it wants them and hands its gradients over when it has them, so that at no time does a tensor live
that the core does not need:

    inputs(produce, saved)      produce("v") projects and returns v; the caller keeps no reference
    attend(saved)               out and log-sum-exp from what `inputs` left
    backward(saved, dout, take) dout() projects the output gradient; take("q", dq) turns dq into gradients at once

What a core saves is kept as attributes, not by `save_for_backward`, because autograd would hold those until the whole
backward has returned, and the peak lies inside it.

In a checkpointed block the first forward saves nothing on the device.  With `memo.save_attention` it leaves out and
log-sum-exp in host memory; the recomputation then is the output projection alone, and q, k, v are projected again only
when backward needs them.  With `keep="host"` everything that backward needs waits there, and nothing is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from cpbench.method import AttentionWeights
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.memo import Memo
from cpbench.runtime.projection import HeadNorm, project, project_backward

Which = Literal["q", "k", "v"]
Produce = Callable[[Which], Tensor]
Take = Callable[[Which, Tensor], None]


class Saved(dict[str, Tensor]):
    """Tensors a core keeps from forward to backward; `pop` gives up the last reference."""


class Core(Protocol):
    """Attention between projected heads, over however many ranks."""

    def inputs(self, produce: Produce, saved: Saved) -> None:
        """Put `q`, `k` and `v` into `saved`, as `attend` and `backward` want them."""

    def attend(self, saved: Saved) -> None:
        """Add `out`, the output of this rank's tokens, `[b, n, h, e]`, and `lse`."""

    def backward(self, saved: Saved, dout: Callable[[], Tensor], take: Take) -> None:
        """Give the gradients of q `[b, n, h, e]` and of k, v `[b, n, k, e]` to `take`, each once.

        The block has finished with `saved["out"]` when this is called.
        """


def attention_block(
    x: Tensor,
    weights: AttentionWeights,
    ctx: AttentionContext,
    core: Core,
    *,
    keep: Literal["device", "host"] = "device",
) -> Tensor:
    """Return the attention block's output, differentiable in x and the weights.

    Args:
        x: normalised hidden states, `[b, n, d]`.
        weights: the block's parameters.
        ctx: this rank's surroundings.
        core: attention between the heads.
        keep: where what backward needs waits for it.

    Returns:
        `[b, n, d]`.
    """
    w = weights
    return _Block.apply(x, w.wq, w.wk, w.wv, w.wo, w.q_norm, w.k_norm, ctx, core, keep)  # type: ignore[no-any-return]


_OUTPUT = ("out", "lse")
_INPUTS = ("q", "k", "v")


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        node: Any,  # noqa: ANN401 - autograd's context has no public type
        x: Tensor,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        wo: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        ctx: AttentionContext,
        core: Core,
        keep: Literal["device", "host"],
    ) -> Tensor:
        weights = AttentionWeights(wq, wk, wv, wo, q_norm, k_norm)
        memo = ctx.memo
        saved = Saved()
        if memo is not None and memo.recomputing and "out" in memo:
            # Kept on the host, both are fetched again in backward rather than held until then.
            keeping = keep == "host"
            saved["out"] = memo.read("out") if keeping else memo.take("out")
            if not keeping:
                saved["lse"] = memo.take("lse")
        else:
            core.inputs(_producer(x, weights, ctx), saved)
            core.attend(saved)
            if memo is not None and not memo.recomputing:
                kept = _INPUTS + _OUTPUT if keep == "host" else _OUTPUT if memo.save_attention else ()
                _put(memo, saved, kept)
                for name in (*_INPUTS, "lse"):
                    saved.pop(name)
            elif keep == "host":
                memo = Memo(ctx.host)
                _put(memo, saved, _INPUTS + _OUTPUT)
                for name in (*_INPUTS, "lse"):
                    saved.pop(name)
        node.save_for_backward(x, wq, wk, wv, wo, q_norm, k_norm)
        node.memo, node.ctx, node.core = memo, ctx, core
        y = saved["out"].flatten(2) @ wo.t()
        if keep == "host":
            saved.pop("out")
        node.kept = saved
        return y

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> Any:  # noqa: ANN401 - autograd's context has no public type
        (dy,) = grads
        x, *tensors = node.saved_tensors
        weights = AttentionWeights(*tensors)
        ctx: AttentionContext = node.ctx
        saved: Saved = node.kept
        memo: Memo | None = node.memo
        node.kept = node.memo = None
        head_dim = ctx.case.architecture.head_dim
        parts = _parts(weights, ctx)
        if "out" not in saved and memo is not None:
            saved["out"] = memo.take("out")
        dwo = dy.flatten(0, 1).t() @ saved["out"].flatten(2).flatten(0, 1)
        ctx.recorder.mark("weight_gradient", dwo)
        dx = torch.empty_like(x)
        ctx.recorder.mark("attention_input_gradient", dx)
        if "q" not in saved:
            if memo is not None and "q" in memo:
                for name in (*_INPUTS, "lse"):
                    saved[name] = memo.take(name)
            else:
                node.core.inputs(_producer(x, weights, ctx), saved)
        found: dict[str, Tensor | None] = {}

        def take(which: Which, grad: Tensor) -> None:
            weight, norm = parts[which]
            rope = None if which == "v" else ctx.rope
            dw, dnorm = project_backward(grad, x, weight, dx, norm=norm, rope=rope, first=not found)
            ctx.recorder.mark("weight_gradient", dw, dnorm)
            found[which], found[which + "_norm"] = dw, dnorm

        node.core.backward(saved, lambda: (dy @ weights.wo).unflatten(-1, (-1, head_dim)), take)
        d = found
        return dx, d["q"], d["k"], d["v"], dwo, d["q_norm"], d["k_norm"], None, None, None


def _put(memo: Memo, saved: Saved, names: Sequence[str]) -> None:
    for name in names:
        memo.put(name, saved[name])


def _producer(x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Produce:
    parts = _parts(weights, ctx)
    head_dim = ctx.case.architecture.head_dim

    def produce(which: Which) -> Tensor:
        weight, norm = parts[which]
        return project(x, weight, head_dim, norm=norm, rope=None if which == "v" else ctx.rope)

    return produce


def _parts(weights: AttentionWeights, ctx: AttentionContext) -> dict[str, tuple[Tensor, HeadNorm | None]]:
    q_norm, k_norm = ctx.head_norms(weights)
    return {"q": (weights.wq, q_norm), "k": (weights.wk, k_norm), "v": (weights.wv, None)}
