"""A core around PyTorch's own ring attention, `torch.distributed.tensor.experimental.context_parallel`.

On CUDA the public interface runs: inside `context_parallel`, `scaled_dot_product_attention` takes local shards as
DTensors and rotates K/V.  Its backward must run inside the context too, so the graph of that one call is kept here and
run by `backward`.  K/V stay at their own width: flash attention takes grouped queries (`enable_gqa`), and the ring
treats them as they are.

Fake tensors (an estimate) are on no CUDA device, and torch's sharded attention has no CPU operators.  There the
function that `context_parallel` ends in, `_templated_ring_attention`, is called with the kernel of the case, so that
its buffers are those of PyTorch; DTensor adds none.  A fake exchange holds nothing; NCCL holds what is sent until the
wait, and so does the rotation here.

Written against torch 2.11 to 2.13, whose sources agree in every name used here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed import _functional_collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from cpbench.runtime.attention_block import Produce, Saved, Take
from cpbench.runtime.context import AttentionContext


class TorchRingCore:
    """See `cpbench.runtime.attention_block.Core`; one object serves one block, forward and backward."""

    def __init__(self, ctx: AttentionContext, rotate: str) -> None:
        """Take the ring of `ctx`, of at least two ranks."""
        if ctx.ring.handle is None:
            raise AssertionError("a ring of one has no process group")
        self._ctx = ctx
        self._group = ctx.ring.handle
        self._rotate = rotate
        self._graph: tuple[GradientEdge, tuple[Tensor, ...]] | None = None

    def inputs(self, produce: Produce, saved: Saved) -> None:
        """Project q, k and v."""
        saved["q"], saved["k"], saved["v"] = produce("q"), produce("k"), produce("v")

    def attend(self, saved: Saved, *, keep: bool) -> None:
        """Ring attention; as in a model that calls it, q, k and v live until it returns."""
        q, k, v = (saved[name] for name in ("q", "k", "v"))
        if not keep:
            for name in ("q", "k", "v"):
                saved.pop(name)
        if q.device.type == "cuda":
            saved["out"] = self._sdpa(q, k, v, keep=keep)
        else:
            saved["out"], saved["lse"] = self._templated(q, k, v)

    def output(self, saved: Saved) -> None:
        """Tokens never left their rank."""

    def backward(self, saved: Saved, dout: Callable[[], Tensor], take: Take) -> None:
        """Run the backward of `attend`."""
        if self._graph is not None:
            for name in ("q", "k", "v", "out"):  # the graph has its own references
                saved.pop(name)
            (edge, inputs), self._graph = self._graph, None
            with self._context_parallel(), sdpa_kernel(self._backend):
                dq, dk, dv = torch.autograd.grad([edge], inputs, [_swap(dout())])
            del edge, inputs
        else:
            dq, dk, dv = self._templated_backward(
                dout(),
                saved.pop("q"),
                saved.pop("k"),
                saved.pop("v"),
                saved.pop("out"),
                saved.pop("lse"),
            )
        take("q", _swap(dq))
        del dq
        take("k", _swap(dk))
        del dk
        take("v", _swap(dv))

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, *, keep: bool) -> Tensor:
        with torch.set_grad_enabled(keep), self._context_parallel(), sdpa_kernel(self._backend):
            query, key, value = (_swap(t.detach()).requires_grad_(keep) for t in (q, k, v))
            # Called through the module, which is where `context_parallel` puts its own.
            out = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self._ctx.scale, enable_gqa=q.shape[2] != k.shape[2]
            )
        if keep:
            self._graph = (get_gradient_edge(out), (query, key, value))
        return _swap(out.detach())

    @contextmanager
    def _context_parallel(self) -> Iterator[None]:
        """PyTorch's context; tokens are in place already, so what it shards is a stand-in of two rows a rank."""
        device = torch.device("cuda", torch.cuda.current_device())
        mesh = DeviceMesh.from_group(self._group, "cuda")
        stand_in = torch.empty(2 * self._ctx.ring.size, device=device)
        set_rotate_method(self._rotate)
        with context_parallel(mesh, buffers=[stand_in], buffer_seq_dims=[0], no_restore_buffers={stand_in}):
            yield

    @property
    def _backend(self) -> SDPBackend:
        cudnn = self._ctx.kernels.name == "cudnn"
        return SDPBackend.CUDNN_ATTENTION if cudnn else SDPBackend.FLASH_ATTENTION

    def _templated(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kernels, scale = self._ctx.kernels, self._ctx.scale

        def attention(query: Tensor, key: Tensor, value: Tensor, **given: object) -> tuple[Tensor, ...]:
            causal = bool(given["is_causal"])
            out, lse = kernels.forward(_swap(query), _swap(key), _swap(value), causal=causal, scale=scale)
            return _swap(out), lse

        set_rotate_method(self._rotate)
        with _as_exchanged(q):
            out, lse, *_ = torch_ring._templated_ring_attention(
                self._group, 2, attention, _swap(q), _swap(k), _swap(v), is_causal=True
            )
        return _swap(out), lse

    def _templated_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels, scale = self._ctx.kernels, self._ctx.scale

        def attention_backward(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            **given: Any,  # noqa: ANN401 - tensors and a flag
        ) -> tuple[Tensor, ...]:
            grads = kernels.backward(
                _swap(given["grad_out"]),
                _swap(query),
                _swap(key),
                _swap(value),
                _swap(given["out"]),
                given["logsumexp"],
                causal=given["is_causal"],
                scale=scale,
            )
            return tuple(_swap(grad) for grad in grads)

        set_rotate_method(self._rotate)
        with _as_exchanged(q):
            dq, dk, dv, *_ = torch_ring._templated_ring_attention_backward(
                self._group,
                2,
                attention_backward,
                _swap(dout),
                "grad_out",
                _swap(q),
                _swap(k),
                _swap(v),
                _swap(out),
                lse,
                is_causal=True,
            )
        return dq, dk, dv


@contextmanager
def _as_exchanged(t: Tensor) -> Iterator[None]:
    """Let fake tensors live as long as real ones that are exchanged.

    torch's fake kernel of a wait makes a second tensor, where the real ones make none, so waits are skipped.
    """
    if not isinstance(t, FakeTensor):
        yield
        return
    with (
        patch.object(_functional_collectives, "_maybe_wrap_tensor", lambda received: received),
        patch.object(torch_ring, "_AllToAllRotater", _HoldingRotater),
    ):
        yield


class _HoldingRotater(torch_ring._AllToAllRotater):
    """Holds what it sends until what comes is waited for; of an all-gather it does not matter, which ends earlier."""

    _sent: Tensor | None = None

    def exchange_buffers(self, curr_buffer: Tensor) -> None:
        """Start an exchange."""
        self._sent = curr_buffer.contiguous()
        super().exchange_buffers(self._sent)

    def next_buffer(self) -> Tensor:
        """End it."""
        self._sent = None
        return super().next_buffer()


def _swap(t: Tensor) -> Tensor:
    """`[b, n, h, e]`, ours, to `[b, h, n, e]`, PyTorch's, or back."""
    return t.transpose(1, 2)
