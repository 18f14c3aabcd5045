"""Attention kernels behind one seam: forward with log-sum-exp, and backward, with native grouped-query attention.

Tensors are `[b, s, h, e]` (keys and values `[b, t, k, e]`, h a multiple of k); the log-sum-exp is float32
`[b, h, s]`.  `causal` needs s == t.  Because the backward takes the *final* output and log-sum-exp, a caller may
compute attention in blocks, merge, and run the backward of each block with the merged values (ring attention, FPDT).

Backends:
    cpu-flash    torch's CPU flash attention (float32, bfloat16)
    cuda-flash   torch's CUDA flash attention, FlashAttention-2 (bfloat16)
    cudnn        cuDNN fused attention through torch (bfloat16)

Each is one custom op, so a trace shows the kernel as one node and what it allocates inside as its scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cpbench.case import AttentionBackend, Case
from cpbench.errors import Unsupported

_ATEN = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Kernels:
    """The attention kernel of a case; `name` is what really runs."""

    name: AttentionBackend

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return (out `[b, s, h, e]`, lse `[b, h, s]` float32)."""
        out, lse = torch.ops.cpbench.attention_forward(q, k, v, causal, scale, self.name)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) in the shapes and dtype of q, k, v; `out` and `lse` may be merged over blocks."""
        dq, dk, dv = torch.ops.cpbench.attention_backward(dout, q, k, v, out, lse, causal, scale, self.name)
        return dq, dk, dv


def select_kernels(case: Case) -> Kernels:
    """Return the kernel for a case.

    Raises:
        Unsupported: the backend asked for cannot run on the device or in the dtype.
    """
    wanted = case.attention_backend
    on_device: tuple[AttentionBackend, ...] = (
        ("cpu-flash",) if case.device == "cpu" else ("cuda-flash", "cudnn")
    )
    if wanted != "auto" and wanted not in on_device:
        raise Unsupported(
            f"attention backend {wanted!r} does not run on {case.device}; choose auto, {', '.join(on_device)}"
        )
    if case.device == "cuda" and case.dtype != "bfloat16":
        raise Unsupported(
            f"flash attention on cuda has no {case.dtype} kernel; use --dtype bfloat16, or --device cpu for float32"
        )
    if case.device == "cuda" and case.architecture.head_dim > 256:
        raise Unsupported(
            f"head_dim={case.architecture.head_dim} is above the 256 that flash attention on cuda takes"
        )
    return Kernels(name=on_device[0] if wanted == "auto" else wanted)


@torch.library.custom_op("cpbench::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Run the forward of one backend; see `Kernels.forward`."""
    if backend == "cpu-flash":
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, scale=scale
        )
        return out.transpose(1, 2), lse
    if backend == "cuda-flash":
        out, lse, *_ = _ATEN._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
        )
        return out, lse
    out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    b, s, h, _e = q.shape
    if backend == "cpu-flash":  # this kernel stores its log-sum-exp with the heads innermost
        return q.new_empty(q.shape), q.new_empty((b, s, h), dtype=torch.float32).transpose(1, 2)
    return q.new_empty(q.shape), q.new_empty((b, h, s), dtype=torch.float32)


@torch.library.custom_op("cpbench::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward of one backend; see `Kernels.backward`."""
    if backend == "cpu-flash":
        grads = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            *(t.transpose(1, 2) for t in (dout, q, k, v, out)), lse, 0.0, causal, scale=scale
        )
        return tuple(g.transpose(1, 2) for g in grads)
    if backend == "cuda-flash":
        # Dropout is off, so the kernel reads neither the generator state nor the sequence offsets.
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        none = torch.empty(0, device=q.device)
        dq, dk, dv = _ATEN._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            causal,
            state,
            none,
            scale=scale,
        )
        return dq, dk, dv
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    grads = _ATEN._scaled_dot_product_cudnn_attention_backward(
        *(t.transpose(1, 2) for t in (dout, q, k, v, out)),
        lse.contiguous().unsqueeze(-1),
        seed,
        seed,
        None,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        causal,
        scale=scale,
    )
    return tuple(g.transpose(1, 2).contiguous() for g in grads)


@attention_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


Scratch = Callable[[Sequence[object]], int]
"""From an operator's arguments to the bytes it allocates inside and frees before it returns."""
_DECLARED: dict[object, Scratch] = {}


def declare_scratch(op: object, scratch: Scratch) -> None:
    """State what a custom operator allocates inside, so that estimates can count it.

    Args:
        op: for example `torch.ops.mine.fused.default`.
        scratch: from its positional arguments, fake tensors in an estimate, to bytes; `lambda args: 0` for nothing.
    """
    _DECLARED[op] = scratch


def scratch_bytes(op: object, args: Sequence[object]) -> int | None:
    """Return what an operator allocates inside and frees before it returns, in bytes; None if nobody has said.

    Attention ops are known, others by `declare_scratch`.

    cuda-flash, from FlashAttention-2's `mha_bwd`: a float32 dq accumulator over lengths rounded up to 128 and widths
    to 32, float32 row sums, and with GQA dk and dv of all query heads; ATen around it copies a dout or out that is not
    contiguous (a slice of a batch's tokens).  Its forward holds nothing.
    cpu-flash, from ATen's `FlashAttentionKernel.cpp` (a test holds it against the allocator): score tiles of up to
    256 x 512 a thread in float32, and in bfloat16 beside them; twice in backward, where a dout that is not contiguous
    is copied too.
    """
    if op in _DECLARED:
        return _DECLARED[op](args)
    backward = op is torch.ops.cpbench.attention_backward.default
    if not backward and op is not torch.ops.cpbench.attention_forward.default:
        return None
    q, k = args[1:3] if backward else args[:2]
    backend = args[8] if backward else args[5]
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(backend, str)):
        raise TypeError("an attention op takes tensors q and k, and the name of a backend")
    copied = 0
    if backward:
        candidates = (args[0],) if backend == "cpu-flash" else (args[0], args[4])
        copied = sum(t.nbytes for t in candidates if isinstance(t, Tensor) and not t.is_contiguous())
    return copied + scratch_of(backend, q.shape, k.shape, q.element_size(), backward=backward)


def cpu_scratch_is_known(dtype: torch.dtype) -> bool:
    """Return whether `scratch_bytes` states what cpu-flash allocates inside on this processor.

    In bfloat16 it does not where oneDNN has bfloat16 matrix products (AVX-512 with AMX, say): there the kernel packs
    its keys and values, and every product takes a workspace, of sizes that only oneDNN knows.
    """
    return dtype == torch.float32 or not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def scratch_of(
    backend: str, queries: Sequence[int], keys: Sequence[int], element: int, *, backward: bool
) -> int:
    """Return `scratch_bytes` of a shape: queries `[b, s, h, e]`, keys `[b, t, k, e]`, bytes of an element."""
    if backend == "cpu-flash":
        return _cpu_scratch(queries, keys, element, backward=backward)
    return _flash_scratch(queries, keys, element) if backward else 0


def _flash_scratch(queries: Sequence[int], keys: Sequence[int], element: int) -> int:
    b, s, h, e = queries
    rows, width = -(-s // 128) * 128, -(-e // 32) * 32
    expanded = 2 * b * keys[1] * h * e * element if keys[2] != h else 0
    return 4 * b * h * rows * (width + 1) + expanded


def _cpu_scratch(queries: Sequence[int], keys: Sequence[int], element: int, *, backward: bool) -> int:
    s, threads = queries[1], torch.get_num_threads()
    rows = min(s, 256 if s >= 768 else 64 if s >= 192 else 32)
    scores = rows * min(keys[1], 512)
    reduced = 2 * scores if element < 4 else 0  # a copy of the scores in the inputs' dtype
    if backward:
        return 4 * rows + threads * 2 * (4 * scores + reduced)
    return threads * (4 * (scores + 2 * rows + rows * queries[3]) + reduced)
