"""Parity of a method with the reference, on real ranks: attention block, causality, whole model.

The reference of the attention block is textbook attention in float32 with materialised scores, differentiated by
autograd, on the whole sequence: it shares no code with any method.  The reference of the whole model is `single` on
one rank.  An error is the larger of |a - b|_2 / |b|_2 and |a - b|_max / |b|_max.

float32 must stay within 1e-5.  bfloat16 is compared with the float32 reference of the same (rounded) inputs and must
stay within 1.5 times the error of `ulysses` at the same shape (loss and gradient norm, being single numbers, within
the standard error of a bfloat16 mean if that is larger); where `ulysses` cannot run the shape there is no limit, and
the findings say so by having no baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

from cpbench import registry
from cpbench.case import STACKS, Case
from cpbench.errors import CpbenchError, Unsupported
from cpbench.method import AttentionWeights, Method
from cpbench.model.seeded import stream_id
from cpbench.model.tiling import Tiles, rms_norm
from cpbench.model_config import ModelConfig
from cpbench.runtime.collectives import Group
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.host_pool import HostPool
from cpbench.runtime.kernels import select_kernels
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.rope import Rope
from cpbench.runtime.streams import Streams
from cpbench.train import DTYPES, TrainStep, World
from cpbench.verification import Check, Verification
from cpbench.world.measure import parallel_groups

FLOAT32_LIMIT = 1e-5
BFLOAT16_FACTOR = 1.5
MODEL_STEPS = 3
STACKS_CHECKED = ("plain", "long")
SMALL_TILES = Tiles(norm=24, mlp=40, loss=56)
"""Odd against the usual lengths, so that tiles do not divide the sequence."""


@dataclass(frozen=True, slots=True)
class BlockResult:
    """Full-size tensors of one attention block: output and gradients by name."""

    tensors: dict[str, Tensor]


class ParityRank:
    """One rank of a verification; every rank makes the same calls."""

    def __init__(self, case: Case, plugins: Sequence[Path], device: torch.device) -> None:
        """Prepare inputs and the reference for the shape of a case.

        Args:
            case: the shape; its method does not matter here.
            plugins: method files outside the tree.
            device: this rank's.
        """
        self.case = case
        self.plugins = plugins
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.inputs = make_inputs(case, device)
        self.reference = self._broadcast(lambda: reference_block(case, self.inputs))
        self._single_losses: dict[str, list[float]] = {}

    def verify(self, case: Case, baseline: dict[str, float] | None) -> Verification:
        """Run every check of one method.

        Args:
            case: resolved, of the shape given to the constructor.
            baseline: errors of `ulysses` by check, which set the limits in bfloat16; None in float32.
        """
        try:
            method = registry.load(case.method, case.options, self.plugins)
            method.check(case)
        except Unsupported as error:
            return Verification(
                method=case.method, options=case.options, verdict="unsupported", reason=str(error)
            )
        checks = [*self.block_checks(case, method, baseline), self.causality(case, method)]
        for stack in STACKS_CHECKED:
            checks += self.model_checks(case, method, stack, baseline)
        failed = [check for check in checks if not check.passed]
        return Verification(
            method=case.method,
            options=case.options,
            verdict="fail" if failed else "pass",
            reason="; ".join(_describe(check) for check in failed) or None,
            checks=tuple(checks),
        )

    def errors(self, case: Case) -> dict[str, float] | None:
        """Return the errors of a method by check name, or None where it cannot run the shape."""
        try:
            method = registry.load(case.method, case.options, self.plugins)
            method.check(case)
        except Unsupported:
            return None
        checks = list(self.block_checks(case, method, None))
        for stack in STACKS_CHECKED:
            checks += self.model_checks(case, method, stack, None)
        return {check.name: check.error for check in checks if check.error is not None}

    def block_checks(self, case: Case, method: Method, baseline: dict[str, float] | None) -> list[Check]:
        """Compare output and all gradients of one attention block."""
        ours = self.block(case, method, self.inputs)
        return [
            self._check(name, relative_error(ours.tensors[name], wanted), baseline)
            for name, wanted in self.reference.items()
        ]

    def causality(self, case: Case, method: Method) -> Check:
        """Change one token; no output before it may change by a single bit."""
        position = case.seq_len // 2
        changed = dict(self.inputs)
        changed["x"] = self.inputs["x"].clone()
        changed["x"][:, position] += 1
        before = self.block(case, method, self.inputs).tensors["out"][:, :position]
        after = self.block(case, method, changed).tensors["out"][:, :position]
        error = float((before - after).abs().max()) if position else 0.0
        return Check(name="causality", error=error, limit=0.0, passed=error == 0.0)

    def model_checks(
        self, case: Case, method: Method, stack: str, baseline: dict[str, float] | None
    ) -> list[Check]:
        """Compare loss and gradient norm of the whole model over three optimizer steps."""
        wanted = self._single(stack)
        layout = method.layout(case, self.rank)
        ulysses, ring = parallel_groups(self.rank, layout)
        mesh = init_device_mesh(self.device.type, (self.size,))
        world = World(rank=self.rank, mesh=mesh, ulysses=ulysses, ring=ring, device=self.device)
        ours = _train(case.model_copy(update={"stack": STACKS[stack]}), method, world)
        half = len(wanted) // 2
        return [
            self._check(f"{name} ({stack})", relative_error(torch.tensor(a), torch.tensor(b)), baseline)
            for name, a, b in (
                ("loss", ours[:half], wanted[:half]),
                ("grad norm", ours[half:], wanted[half:]),
            )
        ]

    def block(self, case: Case, method: Method, inputs: dict[str, Tensor]) -> BlockResult:
        """Run one attention block over all ranks and return its full-size results on every rank."""
        layout = method.layout(case, self.rank)
        ulysses, ring = parallel_groups(self.rank, layout)
        ctx = context_of(case, layout.segments, ulysses, ring, self.device)
        mine = torch.cat([torch.arange(start, stop) for start, stop in layout.segments]).to(self.device)
        leaves = {
            name: t.detach().clone().requires_grad_()
            for name, t in inputs.items()
            if name not in ("x", "dout")
        }
        x = inputs["x"][:, mine].clone().requires_grad_()
        y = method.attention(x, AttentionWeights(**leaves), ctx)
        y.backward(inputs["dout"][:, mine].contiguous())
        result = {"out": self._assemble(y.detach(), mine), "dx": self._assemble(_grad(x), mine)}
        for name, leaf in leaves.items():
            total = _grad(leaf).float()
            dist.all_reduce(total)
            result[f"d{name}"] = total
        return BlockResult(result)

    def _assemble(self, local: Tensor, positions: Tensor) -> Tensor:
        """Put every rank's rows at their global positions; a row held twice or by no one shows as an error."""
        full = torch.zeros(local.shape[0], self.case.seq_len, local.shape[2], device=self.device)
        full[:, positions] = local.float()
        dist.all_reduce(full)
        return full

    def _broadcast(self, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Compute on rank 0 and send to all."""
        a, b, s = self.case.architecture, self.case.batch_size, self.case.seq_len
        shapes: dict[str, tuple[int, ...]] = {"out": (b, s, a.hidden_dim), "dx": (b, s, a.hidden_dim)}
        shapes |= {f"d{n}": tuple(t.shape) for n, t in self.inputs.items() if n not in ("x", "dout")}
        made = (
            make()
            if self.rank == 0
            else {n: torch.empty(shape, device=self.device) for n, shape in shapes.items()}
        )
        for name in shapes:
            made[name] = made[name].contiguous()
            dist.broadcast(made[name], 0)
        return made

    def _single(self, stack: str) -> list[float]:
        """Losses and gradient norms of `single` in float32-for-float32, bfloat16-for-bfloat16, on rank 0."""
        if stack not in self._single_losses:
            mesh = init_device_mesh(self.device.type, (self.size, 1), mesh_dim_names=("copy", "shard"))[
                "shard"
            ]
            found = torch.zeros(2 * MODEL_STEPS, dtype=torch.float64, device=self.device)
            if self.rank == 0:
                alone = {
                    "method": "single",
                    "options": {},
                    "world_size": 1,
                    "stack": STACKS[stack],
                    "dtype": "float32",
                }
                case = self.case.model_copy(update=alone)
                one = Group(size=1, rank=0)
                world = World(rank=0, mesh=mesh, ulysses=one, ring=one, device=self.device)
                found += torch.tensor(_train(case, registry.load("single", {}), world), dtype=torch.float64)
            dist.broadcast(found, 0)
            self._single_losses[stack] = found.tolist()
        return self._single_losses[stack]

    def _check(self, name: str, error: float, baseline: dict[str, float] | None) -> Check:
        theirs = None if baseline is None else baseline.get(name)
        limit = FLOAT32_LIMIT
        if self.case.dtype != "float32":
            limit = math.inf if theirs is None else BFLOAT16_FACTOR * theirs
            if name.startswith(("loss", "grad norm")):
                # The error of one scalar may be near zero by luck; a mean over s tokens of values rounded to 2**-8
                # has a standard error of 2**-8 / sqrt(s).
                limit = max(limit, 2**-8 / (self.case.seq_len * self.case.batch_size) ** 0.5)
        finite = math.isfinite(error)
        return Check(
            name=name,
            error=error if finite else None,
            limit=limit if math.isfinite(limit) else 1e9,
            passed=finite and error <= limit,
            baseline=theirs,
        )


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Return x, dout and the weights of one block, the same on every rank, in the case's dtype."""
    a, b, s = case.architecture, case.batch_size, case.seq_len
    shapes: dict[str, tuple[int, ...]] = {
        "x": (b, s, a.hidden_dim),
        "dout": (b, s, a.hidden_dim),
        "wq": (a.attention_dim, a.hidden_dim),
        "wk": (a.kv_dim, a.hidden_dim),
        "wv": (a.kv_dim, a.hidden_dim),
        "wo": (a.hidden_dim, a.attention_dim),
    }
    if a.qk_norm:
        shapes |= {"q_norm": (a.head_dim,), "k_norm": (a.head_dim,)}
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(stream_id(case.seed, f"parity/{name}") % 2**63)
        t = torch.randn(shape, generator=generator)
        if name.startswith("w"):
            t *= shape[1] ** -0.5
        elif name.endswith("norm"):
            t = 1 + 0.1 * t
        made[name] = t.to(device, DTYPES[case.dtype])
    return made


def reference_block(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return output and gradients of textbook attention over the whole sequence, in float32."""
    a = case.architecture
    leaves = {n: t.detach().float().requires_grad_() for n, t in inputs.items() if n != "dout"}
    q, k, v = (
        functional.linear(leaves["x"], leaves[name]).unflatten(-1, (-1, a.head_dim))
        for name in ("wq", "wk", "wv")
    )
    if a.qk_norm:
        q, k = rms_norm(q, leaves["q_norm"], a.norm_eps), rms_norm(k, leaves["k_norm"], a.norm_eps)
    q, k = (_rotate(t, a) for t in (q, k))
    k, v = (t.repeat_interleave(a.gqa_ratio, dim=2) for t in (k, v))
    scores = torch.einsum("bshe,bthe->bhst", q, k) * a.head_dim**-0.5
    mask = torch.ones(case.seq_len, case.seq_len, dtype=torch.bool, device=q.device).triu(1)
    out = torch.einsum("bhst,bthe->bshe", scores.masked_fill(mask, -math.inf).softmax(-1), v)
    y = functional.linear(out.flatten(2), leaves["wo"])
    y.backward(inputs["dout"].float())
    return {"out": y.detach(), **{f"d{name}": _grad(leaf) for name, leaf in leaves.items()}}


def relative_error(ours: Tensor, wanted: Tensor) -> float:
    """Return the larger of the relative errors in the 2-norm and in the maximum norm; infinite if not finite."""
    difference = ours.double() - wanted.double()
    if not bool(torch.isfinite(difference).all()):
        return math.inf
    two = difference.norm() / wanted.double().norm().clamp_min(1e-300)
    largest = difference.abs().max() / wanted.double().abs().max().clamp_min(1e-300)
    return float(torch.maximum(two, largest))


def context_of(
    case: Case, segments: tuple[tuple[int, int], ...], ulysses: Group, ring: Group, device: torch.device
) -> AttentionContext:
    """Return the surroundings of a block outside a model."""
    recorder = Recorder()
    return AttentionContext(
        case=case,
        ulysses=ulysses,
        ring=ring,
        kernels=select_kernels(case),
        rope=Rope(segments, case.architecture.rope_theta),
        recorder=recorder,
        host=HostPool(device, Streams(device), recorder),
    )


def _rotate(t: Tensor, a: ModelConfig) -> Tensor:
    """RoPE by complex multiplication, a form that no method uses."""
    half = a.head_dim // 2
    frequency = a.rope_theta ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = torch.outer(torch.arange(t.shape[1], dtype=torch.float64, device=t.device), frequency)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    turned = torch.complex(t[..., :half].double(), t[..., half:].double()) * turn
    return torch.cat([turned.real, turned.imag], dim=-1).to(t.dtype)


def _train(case: Case, method: Method, world: World) -> list[float]:
    """Losses of three steps, then their gradient norms."""
    step = TrainStep(case, method, world, Recorder(), SMALL_TILES)
    results = [step.run(index) for index in range(MODEL_STEPS)]
    return [result.loss.item() for result in results] + [result.grad_norm.item() for result in results]


def _grad(t: Tensor) -> Tensor:
    if t.grad is None:
        raise CpbenchError(
            "the method gives no gradient for one of its inputs; its output must depend on all of them"
        )
    return t.grad


def _describe(check: Check) -> str:
    error = "not finite" if check.error is None else f"{check.error:.2e}"
    return f"{check.name}: error {error} above {check.limit:.2e}"
