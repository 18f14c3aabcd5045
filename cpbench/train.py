"""The training step, written once for every world: model, sharding, optimizer, forward, backward, clip, update."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cpbench.case import Case
from cpbench.method import Layout, Method
from cpbench.model.block import BlockSettings
from cpbench.model.seeded import initialise, tokens_at
from cpbench.model.tiling import TILES, Tiles
from cpbench.model.transformer import Decoder
from cpbench.optimizer import OffloadedAdamW
from cpbench.runtime.collectives import Group
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.host_pool import HostPool
from cpbench.runtime.kernels import select_kernels
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.rope import Rope
from cpbench.runtime.streams import Streams
from cpbench.timing.clock import Clock

LEARNING_RATE = 3e-4
MAX_GRAD_NORM = 1.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class World:
    """What a rank knows of the others."""

    rank: int
    mesh: DeviceMesh
    """All ranks, for FSDP."""
    ulysses: Group
    ring: Group
    device: torch.device


@dataclass(slots=True)
class StepResult:
    """Scalars of a step, still on the device."""

    loss: Tensor
    """Mean over the global batch."""
    grad_norm: Tensor
    """Of all gradients, before clipping."""


class TrainStep:
    """One rank's model and optimizer, and the step over them."""

    def __init__(
        self, case: Case, method: Method, world: World, recorder: Recorder, tiles: Tiles | None = None
    ) -> None:
        """Build and shard the model; parameters are made at full size on `meta` only.

        Args:
            case: a resolved case.
            method: of the case, with its options.
            world: this rank's place.
            recorder: told where the step is.
            tiles: sizes instead of the standard ones, for tests.
        """
        self.case = case
        self.world = world
        self.recorder = recorder
        self.layout: Layout = method.layout(case, world.rank)
        self.kernels = select_kernels(case)
        streams = Streams(world.device)
        self.host_pool = HostPool(world.device, streams, recorder, asynchronous=case.device == "cuda")
        self.clock = Clock(world.device)
        self.model = self._sharded(method, tiles or TILES)
        self.optimizer = (
            OffloadedAdamW(self.model.layers(), self.host_pool, streams, recorder, lr=LEARNING_RATE)
            if case.stack.optimizer_offload
            else torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        )

    def run(self, step: int) -> StepResult:
        """Run one training step and return its scalars; the clock then holds forward, backward and optimizer."""
        case, recorder = self.case, self.recorder
        inputs, labels = self._batch(step)
        # FSDP averages gradients over the ranks, so each rank's share of the mean loss is scaled by their number.
        scale = case.world_size / (case.seq_len * case.batch_size)
        self.clock.mark()
        with recorder.scope("forward"):
            loss = self.model(inputs, labels, scale)
        self.clock.mark()
        with recorder.scope("backward"):
            loss.backward()
        self.clock.mark()
        with recorder.scope("optimizer"):
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            self._mark_persistent()
            self.optimizer.zero_grad()
        self.clock.mark()
        mean = loss.detach() / case.world_size
        if case.world_size > 1:
            torch.distributed.all_reduce(mean)
        return StepResult(loss=mean, grad_norm=norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def make_optimizer_states(self) -> None:
        """Make AdamW's states as a first step would, without running one; for estimates, where values do not matter."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self._mark_persistent()
        self.optimizer.zero_grad()

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's tokens and the ones that follow them, `[b, n]` each."""
        case, segments = self.case, self.layout.segments
        shifted = [(start + 1, stop + 1) for start, stop in segments]
        inputs, labels = (
            tokens_at(
                where,
                vocab_size=case.architecture.vocab_size,
                batch_size=case.batch_size,
                seed=case.seed,
                step=step,
                device=self.world.device,
            )
            for where in (segments, shifted)
        )
        return inputs, labels

    def _sharded(self, method: Method, tiles: Tiles) -> Decoder:
        case, world, stack = self.case, self.world, self.case.stack
        ctx = AttentionContext(
            case=case,
            ulysses=world.ulysses,
            ring=world.ring,
            kernels=self.kernels,
            rope=Rope(self.layout.segments, case.architecture.rope_theta),
            recorder=self.recorder,
            host=self.host_pool,
            parts_tile=tiles.parts,
        )
        settings = BlockSettings(
            method=method,
            ctx=ctx,
            tiles=Tiles(
                norm=tiles.norm if stack.tile_norm else None,
                mlp=tiles.mlp if stack.tile_mlp else None,
                loss=tiles.loss if stack.tile_loss else None,
            ),
            checkpoint=stack.checkpoint == "full",
            inputs=self.host_pool if stack.offload == "inputs" else None,
            waiting=[],
            save_attention=stack.save_attention if isinstance(stack.save_attention, int) else 0,
        )
        with torch.device("meta"):
            model = Decoder(case.architecture, settings)
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[case.dtype], reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=world.mesh, mp_policy=policy)
        if not case.architecture.tied_embeddings:
            # Separate groups: the embedding is not held during the blocks, nor the head.
            fully_shard(model.embedding, mesh=world.mesh, mp_policy=policy)
            fully_shard(model.head, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False)
        fully_shard(model, mesh=world.mesh, mp_policy=policy)
        if not isinstance(model, FSDPModule):
            raise AssertionError("fully_shard makes its argument an FSDPModule")
        model.to_empty(device=world.device)
        with torch.no_grad():
            initialise(model, seed=case.seed, num_layers=case.architecture.num_layers)
        return model

    def _mark_persistent(self) -> None:
        """Tell a memory trace which storages are parameters, gradients and optimizer states."""
        if not self.recorder.active:
            return
        parameters = list(self.model.parameters())
        self.recorder.mark("sharded_parameters", *(_local(p) for p in parameters))
        self.recorder.mark("gradients", *(_local(p.grad) for p in parameters if p.grad is not None))
        states = chain.from_iterable(state.values() for state in self.optimizer.state.values())
        self.recorder.mark("optimizer", *(_local(t) for t in states if isinstance(t, Tensor)))


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t
