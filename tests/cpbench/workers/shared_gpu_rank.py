"""One rank over `cpbench.parity.shared_gpu`, on CPU tensors: `torchrun ... shared_gpu_rank.py job.json folder`.

`job.json` is `{"cases": [resolved case...], "plugins": [file...], "stacks": [name...]}`.  `folder/rank<k>.json` gets
what rank k received in every exchange and the bytes that were counted for it; rank 0 adds the checks of each case.
Everything shares one launch, because starting ranks costs more than all of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore
from torch.distributed import _functional_collectives as functional

from cpbench.case import Case
from cpbench.parity import shared_gpu
from cpbench.parity.rank import ParityRank
from cpbench.parity.ranks import Ranks
from cpbench.runtime.collectives import CollectiveLog, Group, ring_pass
from cpbench.runtime.python_group import counting
from cpbench.worker import leave

WORLD = 4


def rows(source: int, target: int) -> int:
    """Rows that a rank sends another where splits are unequal; some send none."""
    return (source + 2 * target) % 4


class Exchanges:
    """Every exchange, its values chosen so that each rank's, and each place's, is another."""

    def __init__(self, folder: Path) -> None:
        self.rank = dist.get_rank()
        self.world: Any = dist.group.WORLD
        self.store = FileStore(str(folder / "store"), WORLD)
        # Interleaved, so that a rank's place in its group is not its rank.
        pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        self.members = [self.rank % 2, self.rank % 2 + 2]
        self.pair: Any = pairs[self.rank % 2]

    def mine(self, dtype: torch.dtype = torch.int64) -> Tensor:
        """`[r, 10 r]`."""
        return torch.tensor([self.rank, 10 * self.rank], dtype=dtype)

    def all_reduce_sum(self) -> Tensor:
        t = self.mine()
        dist.all_reduce(t)
        return t

    def all_reduce_average(self) -> Tensor:
        t = self.mine(torch.float32)
        dist.all_reduce(t, dist.ReduceOp.AVG)
        return t

    def all_reduce_max(self) -> Tensor:
        t = self.mine(torch.bfloat16)
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return t

    def all_reduce_min(self) -> Tensor:
        t = self.mine(torch.int32) + 1
        dist.all_reduce(t, dist.ReduceOp.MIN)
        return t

    def all_reduce_of_a_view(self) -> Tensor:
        """Every second element of a tensor, whose others must stay."""
        t = torch.full((4,), -1.0)
        dist.all_reduce(t[::2].copy_(self.mine()))
        return t

    def all_reduce_bfloat16(self) -> Tensor:
        t = self.mine(torch.bfloat16)
        dist.all_reduce(t)
        return t

    def all_reduce_in_a_pair(self) -> Tensor:
        t = self.mine()
        dist.all_reduce(t, group=self.pair)
        return t

    def product(self) -> str:
        try:
            dist.all_reduce(self.mine(), dist.ReduceOp.PRODUCT)
        except NotImplementedError as error:
            return str(error)
        return "done"

    def reduce_to_two(self) -> Tensor:
        t = self.mine()
        dist.reduce(t, 2)
        return t

    def broadcast_from_one(self) -> Tensor:
        t = self.mine()
        dist.broadcast(t, 1)
        return t

    def broadcast_in_a_pair(self) -> Tensor:
        """From the second of two, by its rank in the world."""
        t = self.mine()
        dist.broadcast(t, self.members[1], group=self.pair)
        return t

    def all_gather(self) -> Tensor:
        parts = [torch.zeros(2, dtype=torch.bfloat16) for _ in range(WORLD)]
        dist.all_gather(parts, self.mine(torch.bfloat16))
        return torch.stack(parts)

    def all_gather_into_tensor(self) -> Tensor:
        found = torch.zeros(2 * WORLD, dtype=torch.bfloat16)
        dist.all_gather_into_tensor(found, self.mine(torch.bfloat16))
        return found

    def all_gather_in_a_pair(self) -> Tensor:
        found = torch.zeros(4, dtype=torch.int64)
        dist.all_gather_into_tensor(found, self.mine(), group=self.pair)
        return found

    def all_gather_object(self) -> list[Any]:
        found: list[Any] = [None] * WORLD
        dist.all_gather_object(found, {"rank": self.rank, "words": "x" * self.rank})
        return found

    def reduce_scatter_sum(self) -> Tensor:
        """Slot s holds `[10 r + s, -s]`."""
        slots = [value for s in range(WORLD) for value in (10 * self.rank + s, -s)]
        found = torch.zeros(2, dtype=torch.int64)
        dist.reduce_scatter_tensor(found, torch.tensor(slots))
        return found

    def reduce_scatter_average(self) -> Tensor:
        slots = torch.tensor([10.0 * self.rank + s for s in range(WORLD)], dtype=torch.bfloat16)
        found = torch.zeros(1, dtype=torch.bfloat16)
        dist.reduce_scatter_tensor(found, slots, dist.ReduceOp.AVG)
        return found

    def all_to_all_equal(self) -> Tensor:
        """Sender and receiver, as a two-digit number."""
        slots = torch.tensor([10 * self.rank + s for s in range(WORLD)], dtype=torch.bfloat16)
        found = torch.zeros_like(slots)
        dist.all_to_all_single(found, slots)
        return found

    def all_to_all_unequal(self) -> Tensor:
        sent = [rows(self.rank, target) for target in range(WORLD)]
        received = [rows(source, self.rank) for source in range(WORLD)]
        slots = torch.tensor([[self.rank, t] for t, size in enumerate(sent) for _ in range(size)])
        found = torch.zeros(sum(received), 2, dtype=torch.int64)
        dist.all_to_all_single(found, slots, received, sent)
        return found

    def ring(self) -> list[Tensor]:
        """Two tensors to the next rank in one batch."""
        everyone = Group.of(range(WORLD), self.rank, self.world)
        return list(ring_pass((self.mine(torch.bfloat16), self.mine()[:1] + 100), everyone).wait())

    def ring_of_a_pair(self) -> list[Tensor]:
        return list(ring_pass((self.mine(),), Group.of(self.members, self.rank, self.pair)).wait())

    def barrier(self) -> bool:
        """Rank 3 arrives after rank 0 is on its way, and rank 0 must not come back before that."""
        if self.rank == 0:
            self.store.set("rank 0 arrives", "")
        if self.rank == 3:
            self.store.wait(["rank 0 arrives"])
            self.store.set("rank 3 arrives", "")
        dist.barrier()
        return self.store.check(["rank 3 arrives"])

    def functional_gather(self) -> Tensor:
        return functional.all_gather_tensor(self.mine()[:, None], 1, self.world).contiguous()

    def functional_permute(self) -> Tensor:
        found: Tensor = functional.permute_tensor(self.mine(), [1, 2, 3, 0], self.world)
        return found.contiguous()

    def functional_sum(self) -> Tensor:
        return functional.all_reduce(self.mine(), "sum", self.pair).contiguous()


EXCHANGES: dict[str, Callable[[Exchanges], Any]] = {
    name: value for name, value in vars(Exchanges).items() if name[0] != "_" and name != "mine"
}


def plain(value: Any) -> Any:  # noqa: ANN401 - whatever an exchange returns
    if isinstance(value, Tensor):
        return value.tolist()
    return [plain(item) for item in value] if isinstance(value, list) else value


def main(job_file: str, folder: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    dist.init_process_group(shared_gpu.BACKEND)
    exchanges = Exchanges(Path(folder))
    found: dict[str, Any] = {}
    for name, exchange in EXCHANGES.items():
        log = CollectiveLog()
        with counting(log):
            value = exchange(exchanges)
        found[name] = {"value": plain(value), "sent": log.bytes}
    everyone, alone = Ranks.make(torch.device("cpu"))
    cases = [Case.model_validate(raw) for raw in job["cases"]]
    plugins = [Path(file) for file in job["plugins"]]
    shape = ParityRank(cases[0], plugins, everyone, alone)
    results = [shape.verify(case, job["stacks"], None).model_dump(mode="json") for case in cases]
    text = json.dumps({"exchanges": found, "results": results})
    Path(folder, f"rank{exchanges.rank}.json").write_text(text, encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
