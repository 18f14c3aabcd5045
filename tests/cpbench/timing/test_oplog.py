"""What a step's operations cost and wait for, as written down over fake tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cpbench import registry
from cpbench.case import Case
from cpbench.memory.fake_trace import FakeTrace
from cpbench.model_config import ModelConfig
from cpbench.resolve import resolve
from cpbench.runtime.collectives import CountCollectives
from cpbench.runtime.host_pool import HostPool
from cpbench.runtime.kernels import Kernels
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.streams import Streams
from cpbench.runtime.tiles import sampled_tiles, tiles
from cpbench.timing.operation import Operation
from cpbench.timing.oplog import OpLog
from cpbench.world import estimate
from cpbench.world.estimate import traced_step

CPU = torch.device("cpu")


def logged(program: Callable[[Recorder], None], *, ranks_on_node: int = 8) -> list[Operation]:
    """The operations of a program over fake tensors."""
    recorder = Recorder()
    log = OpLog(recorder, ranks_on_node=ranks_on_node)
    with FakeTensorMode(), FakeTrace(recorder, log) as trace, CountCollectives(log):
        log.trace, log.active = trace, True
        program(recorder)
    return [operation for _, operation in log.operations]


def fake_group(ranks: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


@pytest.fixture
def group(request: pytest.FixtureRequest) -> object:
    fake_group(8)
    yield SimpleNamespace()
    dist.destroy_process_group()


def test_matrix_products_and_traffic() -> None:
    """A product of 20x30 and 30x40 in bfloat16: 2 x 20 x 30 x 40 FLOPs, all three matrices moved; views are free."""

    def program(recorder: Recorder) -> None:
        a, b = torch.empty(20, 30, dtype=torch.bfloat16), torch.empty(40, 30, dtype=torch.bfloat16)
        c = a @ b.t()
        c.add_(1)
        c.view(-1)[:10].copy_(torch.empty(10, dtype=torch.bfloat16).expand(10))
        torch.addmm(c, a, b.t())

    product, add, copy, addmm = logged(program)
    assert (product.work, product.flops, product.size) == ("matmul", 48_000, 2 * (600 + 1200 + 800))
    assert (add.work, add.flops, add.size) == ("memory", 0, 2 * 1600)
    assert copy.size == 2 * 20
    assert (addmm.flops, addmm.size) == (48_000, 2 * (800 + 600 + 1200 + 800))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_counts_half_of_a_causal_square(causal: bool) -> None:
    """Forward 4, backward 10 x s x t x heads x width; half when causal."""
    kernels = Kernels("cuda-flash")

    def program(recorder: Recorder) -> None:
        q, k = torch.empty(2, 64, 8, 16), torch.empty(2, 64, 2, 16)
        out, lse = kernels.forward(q, k, k, causal=causal, scale=1.0)
        kernels.backward(out, q, k, k, out, lse, causal=causal, scale=1.0)

    forward, backward = logged(program)
    square = 2 * 64 * 64 * 8 * 16 // (2 if causal else 1)
    assert (forward.flops, backward.flops) == (4 * square, 10 * square)
    assert forward.shape == backward.shape == (2, 64, 64, 8, 16)


def test_a_synchronous_collective_stops_compute(group: object) -> None:
    """It starts after the compute before it, and the next computation waits for it, whatever that touches."""

    def program(recorder: Recorder) -> None:
        sent, received, other = torch.ones(800), torch.empty(800), torch.empty(10)
        dist.all_to_all_single(received, sent)
        other.add_(1)
        received.add_(1)

    fill, exchange, other, use = logged(program, ranks_on_node=4)
    assert (exchange.work, exchange.name, exchange.size) == ("collective", "all_to_all", 3200 * 7 // 8)
    assert (exchange.ranks, exchange.ranks_on_node) == (8, 4)
    assert exchange.waits == (fill,)
    assert other.waits == (exchange,)
    assert use.waits == ()


def test_an_asynchronous_collective_is_waited_for_where_its_result_is_used(group: object) -> None:
    """Compute goes on beside it until something reads what was received."""

    def program(recorder: Recorder) -> None:
        sent, received, other = torch.ones(800), torch.empty(800), torch.empty(10)
        work = dist.all_to_all_single(received, sent, async_op=True)
        other.add_(1)
        work.wait()
        received.add_(1)

    _, exchange, other, use = logged(program)
    assert other.waits == ()
    assert use.waits == (exchange,)


def test_two_views_of_what_arrives_are_waited_for_once(group: object) -> None:
    """A computation on both halves of a received tensor waits for one exchange."""

    def program(recorder: Recorder) -> None:
        sent, received = torch.ones(800), torch.empty(800)
        work = dist.all_to_all_single(received, sent, async_op=True)
        work.wait()
        received[:400].add_(received[400:])

    _, exchange, use = logged(program)
    assert use.waits == (exchange,)


def test_what_was_sent_is_freed_only_when_it_is_gone(group: object) -> None:
    """Compute waits for an exchange before it may use the memory of what was sent."""

    def program(recorder: Recorder) -> None:
        sent, received, other = torch.ones(800), torch.empty(800), torch.empty(10)
        dist.all_to_all_single(received, sent, async_op=True)
        del sent
        other.add_(1)

    _, exchange, other = logged(program)
    assert other.waits == (exchange,)


def test_sends_and_receives_overlap_compute_until_the_data_is_read(group: object) -> None:
    """The reader of what came from the neighbour waits for the exchange, a computation before it does not."""

    def program(recorder: Recorder) -> None:
        sent, received, other = torch.ones(800), torch.empty(800), torch.empty(10)
        operations = [dist.P2POp(dist.isend, sent, 1), dist.P2POp(dist.irecv, received, 7)]
        works = dist.batch_isend_irecv(operations)
        other.add_(1)
        for work in works:
            work.wait()
        received.add_(1)

    _, send, other, use = logged(program)
    assert (send.name, send.size) == ("send", 3200)
    assert other.waits == ()
    assert use.waits == (send,)


def test_copies_to_the_host_and_back() -> None:
    """A copy out starts after compute and is waited for at the next store; a copy in where its tensor is used."""

    def program(recorder: Recorder) -> None:
        pool = HostPool(CPU, Streams(CPU), recorder, asynchronous=True)
        stored = pool.store(torch.ones(1000))
        other = torch.empty(10)
        other.add_(1)
        pool.prefetch(stored)
        other.mul_(2)
        tensor: Tensor = pool.fetch(stored)
        tensor.add_(1)

    fill, out, add, back, mul, use = logged(program)
    assert [o.stream for o in (out, back)] == ["copy_out", "copy_in"]
    assert out.size == back.size == 4000
    assert out.waits == (fill,)
    assert add.waits == ()
    assert back.waits == (add, out)
    assert mul.waits == ()
    assert back in use.waits


def test_tiles_that_are_not_run_are_counted() -> None:
    """With and without sampling, the work of a loop over tiles is the same."""

    def program(recorder: Recorder) -> None:
        x = torch.empty(100, 8)
        for rows in tiles(100, 7):
            x[rows] @ x[rows].t()

    every = logged(program)
    with sampled_tiles():
        few = logged(program)

    assert len(few) < len(every) == 15
    assert sum(o.flops * o.times for o in few) == sum(o.flops for o in every)
    assert sum(o.size * o.times for o in few) == sum(o.size for o in every)


def deep_case(method: str, *, layers: int) -> Case:
    """Long enough for every loop over tiles to have more of them than are sampled, the last one shorter."""
    model = ModelConfig(
        hidden_dim=64,
        num_layers=layers,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        ffn_dim=96,
        vocab_size=101,
    )
    requested = Case.model_validate(
        {
            "method": method,
            "model": "deep",
            "architecture": model,
            "seq_len": 26_112 if method != "single" else 13_056,
            "world_size": 1 if method == "single" else 2,
            "mode": "estimate",
            "device": "cuda",
            "hardware": "h100-80g",
        }
    )
    resolved, unsupported = resolve(requested, [])
    if unsupported is not None:
        pytest.skip(unsupported)
    return resolved


def totals(case: Case) -> tuple[Counter[str], Counter[str]]:
    """FLOPs and bytes of a step by operator, every layer run."""
    flops: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for _, operation in traced_step(
        case, registry.load(case.method, case.options), edges=()
    ).trace.operations:
        flops[operation.name] += operation.flops * operation.times
        sizes[operation.name] += operation.size * operation.times
    return flops, sizes


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(registry.method_files()))
def test_sampled_tiles_do_all_the_work(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs and bytes of every operator are those of running all tiles."""
    case = deep_case(method, layers=2)
    sampled = totals(case)
    monkeypatch.setattr(estimate, "sampled_tiles", nullcontext)
    every = totals(case)

    assert sampled[0] == every[0]
    different = {
        name: (size, sampled[1][name]) for name, size in every[1].items() if size != sampled[1][name]
    }
    # A loop that loads the next tile ahead loads one more than there are where tiles between two are left out.
    true, counted = different.pop("copy_in", (1, 1))
    assert true <= counted <= 1.5 * true
    assert different == {}


@pytest.mark.slow
def test_a_steps_matrix_flops_are_those_of_the_model() -> None:
    """Checkpointed, matrix products and attention run once more forward; a rank does its share of it."""
    case = deep_case("ulysses", layers=2)
    flops, _ = totals(case)

    a, tokens = case.architecture, case.seq_len // case.world_size
    forward = 2 * tokens * a.num_layers * a.layer_matrix_params
    head = 2 * tokens * a.vocab_size * a.hidden_dim
    last = (
        2 * tokens * a.num_layers * a.hidden_dim * a.ffn_dim
    )  # the MLP's last product is not needed to recompute
    attention = 2 * a.num_layers * case.seq_len**2 * a.attention_dim // case.world_size
    assert flops["attention_forward"] == 2 * attention
    assert flops["attention_backward"] == 5 * attention // 2
    products = sum(count for name, count in flops.items() if not name.startswith("attention"))
    assert 4 * forward + 3 * head - last <= products <= 4 * forward + 3 * head


def test_two_arguments_may_share_memory_that_a_copy_writes() -> None:
    """AdamW over two pieces of a slot that is being fetched: the first waits for the copy, the second need not."""

    def program(recorder: Recorder) -> None:
        pool = HostPool(CPU, Streams(CPU), recorder, asynchronous=True)
        moments = pool.zeros((2, 40), torch.float32)
        slot, parameter, gradient = (torch.empty(size) for size in ((2, 40), 40, 40))
        slot.copy_(moments.view(), non_blocking=True)
        with recorder.scope("optimizer"):
            torch._fused_adamw_(
                *([t] for t in (parameter, gradient, *slot)),
                [],
                [torch.zeros(())],
                lr=1.0,
                beta1=0.9,
                beta2=0.99,
                weight_decay=0.0,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )

    *_, copy, update = logged(program)
    assert (copy.work, copy.stream) == ("copy", "copy_in")
    assert copy in update.waits
