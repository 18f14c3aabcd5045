"""Parity of every attention kernel, and of every method's attention with its ranks as threads, on one device.

    python -m cpbench.parity.one_device --device cuda --out parity.json

Kernels are held against textbook attention in float32, methods against the textbook block, as `cpbench verify` does.
The exit code is 1 if anything fails; the file has a list of `Finding`s.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from cpbench import registry
from cpbench.case import STACKS, AttentionBackend, Case, Device, Dtype
from cpbench.model_config import ModelConfig
from cpbench.parity import checks
from cpbench.parity.block import Block
from cpbench.parity.limits import Limits
from cpbench.parity.reference import make_inputs, reference_block, relative_error
from cpbench.parity.thread_ranks import ThreadRanks, Threads
from cpbench.resolve import resolve
from cpbench.runtime.kernels import Kernels
from cpbench.train import DTYPES
from cpbench.verification import Check

WORLD_SIZE = 4
KERNELS: dict[Device, tuple[AttentionBackend, ...]] = {"cpu": ("cpu-flash",), "cuda": ("cuda-flash", "cudnn")}
_KERNEL_LIMIT: dict[Dtype, float] = {"float32": 1e-5, "bfloat16": 2e-2}
"""bfloat16 rounds inputs, probabilities and results to 8 bits."""
# heads, KV heads, head_dim, queries, keys (causal where they are as many)
_KERNEL_SHAPES = ((4, 4, 64, 256, 256), (8, 2, 128, 512, 512), (8, 1, 128, 200, 200), (8, 2, 128, 256, 640))
# heads, KV heads, head_dim, hidden, tokens
_SHAPES = ((8, 4, 64, 256, 256), (8, 2, 128, 192, 208))
_NOT_IN_THREADS = {
    "torch-ring": "needs a device mesh, so a process a rank, which share no device; no GPU has run it"
}
"""Methods that this cannot check, and why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One kernel or method at one shape."""

    what: str
    name: str
    shape: str
    passed: bool | None
    """None: not run."""
    worst: str
    """The check nearest to its limit, what went wrong, or why it was not run."""


def kernel_findings(device: torch.device, dtype: Dtype) -> Iterator[Finding]:
    """Hold every kernel of a device against textbook attention, forward and backward."""
    kind: Device = "cuda" if device.type == "cuda" else "cpu"
    for name in KERNELS[kind]:
        for heads, kv_heads, width, queries, keys in _KERNEL_SHAPES:
            shape = f"{heads}/{kv_heads} heads x {width}, {queries} x {keys}"
            try:
                errors = _kernel_errors(Kernels(name), (heads, kv_heads, width, queries, keys), device, dtype)
            except Exception as error:  # another kernel may still work
                yield Finding(
                    "kernel", name, shape, False, f"{type(error).__name__}: {error}".splitlines()[0]
                )
                continue
            quantity, worst = max(errors.items(), key=lambda item: (item[1] != item[1], item[1]))
            limit = _KERNEL_LIMIT[dtype]
            yield Finding("kernel", name, shape, worst <= limit, f"{quantity} {worst:.1e} of {limit:.1e}")


def method_findings(device: torch.device, dtype: Dtype, names: Sequence[str] = ()) -> Iterator[Finding]:
    """Hold every method's attention block, on threads, against the textbook block."""
    for heads, kv_heads, width, hidden, tokens in _SHAPES:
        for name in names or registry.method_files():
            for options in registry.verify_options(registry.require(name)):
                case = Case(
                    method=name,
                    options=options,
                    model="parity",
                    architecture=ModelConfig(
                        hidden_dim=hidden,
                        num_layers=1,
                        num_heads=heads,
                        num_kv_heads=kv_heads,
                        head_dim=width,
                        ffn_dim=hidden,
                        vocab_size=251,
                    ),
                    seq_len=tokens,
                    world_size=1 if name == "single" else WORLD_SIZE,
                    dtype=dtype,
                    stack=STACKS["long"],
                    device="cuda" if device.type == "cuda" else "cpu",
                )
                yield _method_finding(case, device)


def _method_finding(requested: Case, device: torch.device) -> Finding:
    a = requested.architecture
    options = " ".join(f"{key}={value}" for key, value in requested.options.items())
    shape = (
        f"{a.num_heads}/{a.num_kv_heads} heads x {a.head_dim}, {requested.seq_len} tokens {options}".rstrip()
    )
    if requested.method in _NOT_IN_THREADS:
        return Finding("method", requested.method, shape, None, _NOT_IN_THREADS[requested.method])
    try:
        case, unsupported = resolve(requested, [])
        if unsupported:
            return Finding("method", requested.method, shape, None, unsupported)
        found = block_checks(case, device)
    except Exception as error:  # another method may still work
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding("method", requested.method, shape, False, problem)
    worst = max(found, key=lambda c: float("inf") if c.error is None else c.error / c.limit)
    words = (
        f"{worst.name} {'not finite' if worst.error is None else f'{worst.error:.1e}'} of {worst.limit:.1e}"
    )
    return Finding("method", requested.method, shape, all(check.passed for check in found), words)


def block_checks(case: Case, device: torch.device, plugins: Sequence[Path] = ()) -> list[Check]:
    """Run a method's block on as many threads as the case has ranks, with and without recomputation.

    Args:
        case: resolved.
        device: that all threads share.
        plugins: method files outside the tree.

    Returns:
        Checks of the output and of all gradients.
    """
    inputs = make_inputs(case, device)
    reference = reference_block(case, inputs)
    method = registry.load(case.method, case.options, plugins)

    def work(ranks: ThreadRanks) -> list[Check]:
        def baseline(where: str) -> dict[str, float]:
            base = registry.load("single" if ranks.size == 1 else "ulysses", {})
            run = Block(case.model_copy(update={"options": {}}), base, ranks).run(inputs)
            return {name: relative_error(run.tensors[name], t) for name, t in reference.items()}

        limits = Limits(case, baseline)
        limits.prepare("block")
        block = Block(case, method, ranks)
        found = checks.against_reference(block.run(inputs), reference, limits)
        again = block.run(inputs, "checkpoint")
        return found + checks.against_reference(again, reference, limits, "checkpoint")

    return Threads(case.world_size, device).run(work)


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
    """Check kernels and methods, print a line for each, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cpbench.parity.one_device")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    findings: list[Finding] = []
    for source in (kernel_findings(device, given.dtype), method_findings(device, given.dtype, given.method)):
        for finding in source:
            findings.append(finding)
            verdict = {True: "pass", False: "FAIL", None: "not run"}[finding.passed]
            sys.stdout.write(f"{verdict}  {finding.what} {finding.name}  {finding.shape}  {finding.worst}\n")
            sys.stdout.flush()
            if given.out is not None:  # after each, so that a time limit loses nothing
                given.out.write_text(json.dumps([asdict(f) for f in findings], indent=1), encoding="utf-8")
    verdicts = {finding.passed for finding in findings}
    return 0 if True in verdicts and False not in verdicts else 1


if __name__ == "__main__":
    sys.exit(main())
