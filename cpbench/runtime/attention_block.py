"""The attention block around a core: projections, the core between q, k, v and the output, output projection.

Methods that do not chunk the projections (`single`, `ring`, `ulysses`, ...) give only a *core*.  The core asks for
its inputs when it wants them and hands its gradients over when it has them, so that at no time does a tensor live
that the core does not need:

    inputs(produce, saved)      produce("v") projects and returns v; the caller keeps no reference
    attend(saved, keep)         out and log-sum-exp from what `inputs` left, which goes with its last use unless kept
    output(saved)               out of this rank's tokens from out as `attend` left it
    backward(saved, dout, take) dout() projects the output gradient; take("q", dq) turns dq into gradients at once

What a core saves is kept as attributes, not by `save_for_backward`, because autograd would hold those until the whole
backward has returned, and the peak lies inside it.

In a checkpointed block the first forward saves nothing on the device.  With `memo.save_attention` it leaves out and
log-sum-exp in host memory; the recomputation then is the output projection alone, and q, k, v are projected again only
when backward needs them.  With `keep="host"` everything that backward needs waits there, and nothing is recomputed:
k, v and q leave beside the attention kernel that reads them, out beside the output projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from cpbench.method import ATTENTION_WEIGHTS, AttentionWeights
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.memo import Memo
from cpbench.runtime.projection import Which, project, project_backward

Produce = Callable[[Which], Tensor]
Take = Callable[[Which, Tensor], None]
Keep = Literal["device", "host"]


class Saved:
    """Tensors a core keeps from forward to backward, by name; some may wait in host memory."""

    def __init__(self) -> None:
        self.device: dict[str, Tensor] = {}
        self.host: Memo | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.device or (self.host is not None and name in self.host)

    def __setitem__(self, name: str, t: Tensor) -> None:
        self.device[name] = t

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.device and self.host is not None:
            self.device[name] = self.host.take(name)
        return self.device[name]

    def pop(self, name: str) -> Tensor:
        """Give up the last reference to a tensor."""
        if name not in self.device and self.host is not None:
            return self.host.take(name)
        return self.device.pop(name)


class Core(Protocol):
    """Attention between projected heads, over however many ranks."""

    def inputs(self, produce: Produce, saved: Saved) -> None:
        """Put `q`, `k` and `v` into `saved`, as `attend` and `backward` want them."""

    def attend(self, saved: Saved, *, keep: bool) -> None:
        """Add `out` and `lse`; unless `keep`, take q, k and v out of `saved` and let go of each when it is dead."""

    def output(self, saved: Saved) -> None:
        """Replace `out` by the output of this rank's tokens, `[b, n, h, e]`."""

    def backward(self, saved: Saved, dout: Callable[[], Tensor], take: Take) -> None:
        """Give the gradients of q `[b, n, h, e]` and of k, v `[b, n, k, e]` to `take`, each once.

        The block has finished with `saved["out"]`, which is as `output` left it.
        """


def attention_block(
    x: Tensor,
    weights: AttentionWeights,
    ctx: AttentionContext,
    core: Core,
    *,
    keep: Keep = "device",
    prefetch: bool = True,
) -> Tensor:
    """Return the attention block's output, differentiable in x and the weights.

    Args:
        x: normalised hidden states, `[b, n, d]`.
        weights: the block's parameters.
        ctx: this rank's surroundings.
        core: attention between the heads.
        keep: where what backward needs waits for it.
        prefetch: what waits on the host starts to come back as soon as the block's backward pass begins (in a
            checkpointed block: once the recomputation has the output), rather than when it is needed.

    Returns:
        `[b, n, d]`.
    """
    return _Block.apply(x, ctx, core, keep, prefetch, *weights.tensors())  # type: ignore[no-any-return]


_INPUTS: tuple[Which, ...] = (
    "k",
    "v",
    "q",
)  # q last: the larger, and the one whose copy the kernel need not await


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        node: Any,  # noqa: ANN401 - autograd's context has no public type
        x: Tensor,
        ctx: AttentionContext,
        core: Core,
        keep: Keep,
        prefetch: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        weights = AttentionWeights.of(tensors)
        node.save_for_backward(x, *tensors)
        node.ctx, node.core, node.prefetch = ctx, core, prefetch
        memo, saved = ctx.memo, Saved()
        node.kept = saved
        if memo is not None and memo.recomputing and "out" in memo:
            saved.host = memo
            return _recomputed(saved, weights.wo, whole=keep == "host", prefetch=prefetch)
        if keep == "host" and memo is None:
            memo = Memo(ctx.host)
        leaving = memo is not None and not memo.recomputing  # nothing stays on the device
        to_host = memo if leaving and memo is not None and (keep == "host" or memo.save_attention) else None
        core.inputs(_producer(x, weights, ctx), saved)
        if to_host is not None and keep == "host":
            for name in _INPUTS:
                to_host.put(name, saved[name])
        core.attend(saved, keep=not leaving)
        if to_host is not None:
            to_host.put("lse", saved["lse"])
        if leaving and "lse" in saved:
            saved.pop("lse")
        core.output(saved)
        if to_host is not None:
            to_host.put("out", saved["out"])
        y = saved["out"].flatten(2) @ weights.wo.t()
        if leaving:
            saved.pop("out")
            saved.host = to_host
        return y

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> Any:  # noqa: ANN401 - autograd's context has no public type
        (dy,) = grads
        x, *tensors = node.saved_tensors
        weights = AttentionWeights.of(tensors)
        ctx: AttentionContext = node.ctx
        saved: Saved = node.kept
        node.kept = None
        if node.prefetch:
            _prefetch(saved, ("out", *_INPUTS, "lse"))
        head_dim = ctx.case.architecture.head_dim
        projections = ctx.projections(weights)
        dwo = dy.flatten(0, 1).t() @ saved["out"].flatten(2).flatten(0, 1)
        ctx.recorder.mark("weight_gradient", dwo)
        dx = torch.empty_like(x)
        ctx.recorder.mark("attention_input_gradient", dx)
        if "q" not in saved:
            node.core.inputs(_producer(x, weights, ctx), saved)
        found: dict[str, Tensor | None] = {}

        def take(which: Which, grad: Tensor) -> None:
            d = project_backward(grad, x, projections[which], dx, first=not found)
            ctx.recorder.mark("weight_gradient", d.weight, d.bias, d.norm)
            found.update(d.named(which))

        node.core.backward(saved, lambda: (dy @ weights.wo).unflatten(-1, (-1, head_dim)), take)
        found["wo"] = dwo
        return dx, None, None, None, None, *(found[name] for name in ATTENTION_WEIGHTS)


def _recomputed(saved: Saved, wo: Tensor, *, whole: bool, prefetch: bool) -> Tensor:
    """Project the output that the first forward left on the host; `whole`: it left all that backward needs.

    Without prefetching, a block that left everything holds nothing until its backward, and fetches out twice.
    """
    memo = saved.host
    if memo is None:
        raise AssertionError("only a block with a memo is recomputed from it")
    if whole and not prefetch:
        return memo.read("out").flatten(2) @ wo.t()
    y = saved["out"].flatten(2) @ wo.t()
    if whole:
        _prefetch(saved, (*_INPUTS, "lse"))
    else:
        saved["lse"] = memo.take("lse")
    return y


def _prefetch(saved: Saved, names: tuple[str, ...]) -> None:
    if saved.host is not None:
        for name in names:
            if name not in saved.device and name in saved.host:
                saved.host.prefetch(name)


def _producer(x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Produce:
    projections = ctx.projections(weights)
    head_dim = ctx.case.architecture.head_dim

    def produce(which: Which) -> Tensor:
        return project(x, projections[which], head_dim)

    return produce
