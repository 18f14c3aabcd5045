"""Parity of every attention kernel of a device, in one process.

    python -m cpbench.parity.kernel_checks --device cuda --out kernels.json

Output, log-sum-exp and gradients are held against textbook attention in float32.  The exit code is 1 if anything fails;
the file has a list of `Finding`s.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cpbench.case import AttentionBackend, Device, Dtype
from cpbench.kernel_finding import KernelFinding, KernelFindings
from cpbench.runtime.kernels import Kernels
from cpbench.train import DTYPES

KERNELS: dict[Device, tuple[AttentionBackend, ...]] = {"cpu": ("cpu-flash",), "cuda": ("cuda-flash", "cudnn")}
_LIMIT: dict[Dtype, float] = {"float32": 1e-5, "bfloat16": 2e-2}
"""bfloat16 rounds inputs, probabilities and results to 8 bits."""
# heads, KV heads, head_dim, queries, keys (causal where they are as many)
_SHAPES = ((4, 4, 64, 256, 256), (8, 2, 128, 512, 512), (8, 1, 128, 200, 200), (8, 2, 128, 256, 640))


def kernel_findings(device: torch.device, dtype: Dtype) -> Iterator[KernelFinding]:
    """Hold every kernel of a device against textbook attention, forward and backward."""
    kind: Device = "cuda" if device.type == "cuda" else "cpu"
    for name in KERNELS[kind]:
        for heads, kv_heads, width, queries, keys in _SHAPES:
            shape = f"{heads}/{kv_heads} heads x {width}, {queries} x {keys}"
            try:
                errors = _kernel_errors(Kernels(name), (heads, kv_heads, width, queries, keys), device, dtype)
            except Exception as error:  # another kernel may still work
                words = f"{type(error).__name__}: {error}".splitlines()[0]
                yield KernelFinding(kernel=name, shape=shape, passed=False, worst=words)
                continue
            quantity, worst = max(errors.items(), key=lambda item: (item[1] != item[1], item[1]))
            limit = _LIMIT[dtype]
            words = f"{quantity} {worst:.1e} of {limit:.1e}"
            yield KernelFinding(kernel=name, shape=shape, passed=worst <= limit, worst=words)


def _kernel_errors(
    kernels: Kernels, shape: tuple[int, int, int, int, int], device: torch.device, dtype: Dtype
) -> dict[str, float]:
    heads, kv_heads, width, queries, keys = shape
    causal, scale = queries == keys, width**-0.5
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, count: int) -> Tensor:
        return torch.randn(2, tokens, count, width, generator=generator).to(device, DTYPES[dtype])

    q, k, v, dout = draw(queries, heads), draw(keys, kv_heads), draw(keys, kv_heads), draw(queries, heads)
    leaves = [t.clone().float().requires_grad_() for t in (q, k, v)]
    wide = [t.repeat_interleave(heads // kv_heads, dim=2) for t in leaves[1:]]
    scores = torch.einsum("bshe,bthe->bhst", leaves[0], wide[0]) * scale
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)
        scores = scores.masked_fill(mask, float("-inf"))
    expected = torch.einsum("bhst,bthe->bshe", scores.softmax(-1), wide[1])
    wanted = torch.autograd.grad(expected, leaves, dout.float())
    expected = expected.detach()
    out, lse = kernels.forward(q, k, v, causal=causal, scale=scale)
    grads = kernels.backward(dout, q, k, v, out, lse, causal=causal, scale=scale)
    pairs = {"out": (out, expected), "lse": (lse, scores.logsumexp(-1).detach())}
    pairs |= {f"d{n}": (g, w) for n, g, w in zip("qkv", grads, wanted, strict=True)}
    return {name: _distance(ours, theirs) for name, (ours, theirs) in pairs.items()}


def _distance(ours: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, relative; NaN where something is not finite."""
    return float((ours.float() - wanted).norm() / wanted.norm())


def main(arguments: Sequence[str] | None = None) -> int:
    """Check kernels, print a line for each shape, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cpbench.parity.kernel_checks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    findings: list[KernelFinding] = []
    for finding in kernel_findings(torch.device(given.device), given.dtype):
        findings.append(finding)
        verdict = "pass" if finding.passed else "FAIL"
        sys.stdout.write(f"{verdict}  {finding.kernel}  {finding.shape}  {finding.worst}\n")
        sys.stdout.flush()
        if given.out is not None:  # after each, so that a time limit loses nothing
            given.out.write_bytes(KernelFindings.dump_json(findings, indent=1))
    return 0 if all(finding.passed for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
