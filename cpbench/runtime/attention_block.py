"""The attention block around a core: projections, the core between q, k, v and the output, output projection.

Methods that do not chunk the projections (`single`, `ring`, `ulysses`, ...) give only a *core*.  The core asks for
its inputs when it wants them and hands its gradients over when it has them, so that at no time does a tensor live
that the core does not need:

    forward(produce)            produce("v") projects and returns v; the caller keeps no reference
    backward(saved, dout, take) dout() projects the output gradient; take("q", dq) turns dq into gradients at once

What a core saves is kept as attributes, not by `save_for_backward`, because autograd would hold those until the whole
backward has returned, and the peak lies inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from cpbench.method import AttentionWeights
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.projection import HeadNorm, project, project_backward

Which = Literal["q", "k", "v"]
Produce = Callable[[Which], Tensor]
Take = Callable[[Which, Tensor], None]


class Saved(dict[str, Tensor]):
    """Tensors a core keeps from forward to backward; `pop` gives up the last reference."""


class Core(Protocol):
    """Attention between projected heads, over however many ranks."""

    def forward(self, produce: Produce, saved: Saved) -> None:
        """Compute attention; `saved["out"]` must be the output of this rank's tokens, `[b, n, h, e]`."""

    def backward(self, saved: Saved, dout: Callable[[], Tensor], take: Take) -> None:
        """Give the gradients of q `[b, n, h, e]` and of k, v `[b, n, k, e]` to `take`, each once.

        The block has finished with `saved["out"]` when this is called.
        """


def attention_block(x: Tensor, weights: AttentionWeights, ctx: AttentionContext, core: Core) -> Tensor:
    """Return the attention block's output, differentiable in x and the weights.

    Args:
        x: normalised hidden states, `[b, n, d]`.
        weights: the block's parameters.
        ctx: this rank's surroundings.
        core: attention between the heads.

    Returns:
        `[b, n, d]`.
    """
    w = weights
    return _Block.apply(x, w.wq, w.wk, w.wv, w.wo, w.q_norm, w.k_norm, ctx, core)  # type: ignore[no-any-return]


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
    ) -> Tensor:
        weights = AttentionWeights(wq, wk, wv, wo, q_norm, k_norm)
        parts = _parts(weights, ctx)
        head_dim = ctx.case.architecture.head_dim

        def produce(which: Which) -> Tensor:
            weight, norm = parts[which]
            return project(x, weight, head_dim, norm=norm, rope=None if which == "v" else ctx.rope)

        saved = Saved()
        core.forward(produce, saved)
        node.save_for_backward(x, wq, wk, wv, wo, q_norm, k_norm)
        node.kept, node.ctx, node.core = saved, ctx, core
        return saved["out"].flatten(2) @ wo.t()

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> Any:  # noqa: ANN401 - autograd's context has no public type
        (dy,) = grads
        x, *tensors = node.saved_tensors
        weights = AttentionWeights(*tensors)
        ctx: AttentionContext = node.ctx
        saved: Saved = node.kept
        node.kept = None
        head_dim = ctx.case.architecture.head_dim
        parts = _parts(weights, ctx)
        dwo = dy.flatten(0, 1).t() @ saved["out"].flatten(2).flatten(0, 1)
        ctx.recorder.mark("weight_gradient", dwo)
        dx = torch.empty_like(x)
        ctx.recorder.mark("attention_input_gradient", dx)
        found: dict[str, Tensor | None] = {}

        def take(which: Which, grad: Tensor) -> None:
            weight, norm = parts[which]
            rope = None if which == "v" else ctx.rope
            dw, dnorm = project_backward(grad, x, weight, dx, norm=norm, rope=rope, first=not found)
            ctx.recorder.mark("weight_gradient", dw, dnorm)
            found[which], found[which + "_norm"] = dw, dnorm

        node.core.backward(saved, lambda: (dy @ weights.wo).unflatten(-1, (-1, head_dim)), take)
        return dx, found["q"], found["k"], found["v"], dwo, found["q_norm"], found["k_norm"], None, None


def _parts(weights: AttentionWeights, ctx: AttentionContext) -> dict[str, tuple[Tensor, HeadNorm | None]]:
    q_norm, k_norm = ctx.head_norms(weights)
    return {"q": (weights.wq, q_norm), "k": (weights.wk, k_norm), "v": (weights.wv, None)}
