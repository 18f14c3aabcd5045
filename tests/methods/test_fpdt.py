"""FPDT: layout, refusals, closed forms against counts, host memory, and parity over chunk counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpbench.block_count import BlockCount, count_block
from cpbench.case import STACKS, Case, Device, Dtype
from cpbench.errors import Unsupported, UsageError
from cpbench.memory.categories import analyse
from cpbench.memory.timeline import Timeline
from cpbench.method import AttentionWeights
from cpbench.model_config import ModelConfig
from cpbench.runtime.collectives import Group
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.host_pool import HostPool
from cpbench.runtime.kernels import select_kernels
from cpbench.runtime.memo import Memo
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.rope import Rope
from cpbench.runtime.streams import Streams
from cpbench.runtime.tiles import growing_rows, tile_times
from cpbench.selection import Selection
from cpbench.shape import Shape
from cpbench.verification import Verification
from cpbench.verify import VerifyRequest, verify
from cpbench.world.estimate import STEP, Traced, traced_step
from cpbench.world.layers import host_peak_bytes
from methods.fpdt import Fpdt

BROKEN = Path(__file__).parent / "broken"
CHUNK = 65536
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")


def case(
    *,
    seq_len: int,
    world_size: int = 4,
    num_heads: int = 16,
    num_kv_heads: int = 4,
    head_dim: int = 128,
    hidden_dim: int = 2048,
    batch_size: int = 1,
    qk_norm: bool = False,
    attention_bias: bool = False,
    device: Device = "cuda",
    dtype: Dtype = "bfloat16",
    save_attention: int = 0,
) -> Case:
    return Case(
        method="fpdt",
        model="test",
        architecture=ModelConfig(
            hidden_dim=hidden_dim,
            num_layers=1,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            ffn_dim=8,
            vocab_size=8,
            qk_norm=qk_norm,
            attention_bias=attention_bias,
        ),
        seq_len=seq_len,
        batch_size=batch_size,
        world_size=world_size,
        dtype=dtype,
        stack=STACKS["long"].model_copy(update={"save_attention": save_attention}),
        mode="estimate",
        device=device,
    )


def wrong_row(rows: int) -> Iterator[int]:
    """As `growing_rows`, but the first of the rows between stands for them."""
    for row in growing_rows(rows):
        yield 3 if tile_times() > 1 else row


def rows_left_out(rows: int) -> Iterator[int]:
    """As `growing_rows`, but every row stands for itself alone."""
    yield from [*growing_rows(rows)]


@pytest.mark.parametrize(("world_size", "chunk", "count"), [(1, 6, 3), (2, 6, 1), (4, 8, 5)])
def test_a_chunk_of_all_ranks_is_a_contiguous_range(world_size: int, chunk: int, count: int) -> None:
    """The i-th ranges of all ranks, in rank order, are the i-th `chunk` tokens of the sequence."""
    of = case(seq_len=chunk * count, world_size=world_size)

    ranks = [Fpdt(chunk_tokens=chunk).layout(of, rank).segments for rank in range(world_size)]

    for i, parts in enumerate(zip(*ranks, strict=True)):
        positions = list(chain.from_iterable(range(*part) for part in parts))
        assert list(range(i * chunk, (i + 1) * chunk)) == positions


@pytest.mark.parametrize("chunk", [0, 64, 1000])
def test_a_chunk_as_long_as_the_sequence_is_one_chunk(chunk: int) -> None:
    """Zero, the sequence's length and more give every rank one range."""
    assert Fpdt(chunk_tokens=chunk).layout(case(seq_len=64), 1).segments == ((16, 32),)


@pytest.mark.parametrize(
    ("chunk", "changes", "words"),
    [
        (48, {"seq_len": 256}, ("seq_len=240 or 288", "chunk_tokens=32 or 64", "seq_len=256")),
        (30, {"seq_len": 240}, ("chunk_tokens=30", "world_size=4", "chunk_tokens=24 or 40")),
        (0, {"seq_len": 255}, ("seq_len=255", "252 or 256")),
        (0, {"seq_len": 240, "world_size": 3}, ("num_heads=16", "world_size=3", "1, 2, 4, 8, 16")),
    ],
)
def test_what_does_not_divide_is_unsupported_with_the_nearest_that_does(
    chunk: int, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    """The message holds the value, what it must divide by, and the nearest allowed ones."""
    with pytest.raises(Unsupported) as refusal:
        Fpdt(chunk_tokens=chunk).check(case(**changes))

    assert all(word in str(refusal.value) for word in words), refusal.value


def test_the_values_in_a_refusal_are_allowed() -> None:
    """What the message for a length that the chunk does not divide offers passes the check."""
    method, of = Fpdt(chunk_tokens=48), case(seq_len=256)
    with pytest.raises(Unsupported) as refusal:
        method.check(of)
    lengths, chunks = (
        [int(number) for number in re.findall(r"\d+", words)]
        for words in re.findall(r"(?:seq_len|chunk_tokens)=(\d+ or \d+)", str(refusal.value))
    )

    for length in lengths:
        method.check(case(seq_len=length))
    for chunk in chunks:
        Fpdt(chunk_tokens=chunk).check(of)

    assert (lengths, chunks) == ([240, 288], [32, 64])


def test_a_negative_chunk_is_refused() -> None:
    """The option is checked when it is set."""
    with pytest.raises(UsageError, match="negative"):
        Fpdt(chunk_tokens=-1)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_kv_heads": 2, "batch_size": 2, "qk_norm": True, "attention_bias": True},
        {"world_size": 1, "num_kv_heads": 8},
        {"device": "cpu", "dtype": "float32", "num_kv_heads": 16},
        {"device": "cpu", "batch_size": 2, "attention_bias": True},
        {"device": "cpu", "num_kv_heads": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_closed_forms_hold_what_is_counted(count: int, shape: dict[str, Any]) -> None:
    """Collective bytes are exact and both peaks within 1 % of a count over fake tensors."""
    method, of = Fpdt(chunk_tokens=CHUNK), case(seq_len=count * CHUNK, **shape)

    counted, expected = count_block(of, method), method.costs(of)

    assert expected.forward_collective_bytes == counted.forward.bytes
    assert expected.forward_collective_bytes == counted.recomputation.bytes
    assert expected.backward_collective_bytes == counted.backward.bytes
    assert expected.forward_peak_bytes == pytest.approx(counted.forward_peak_bytes, rel=0.01)
    assert expected.backward_peak_bytes == pytest.approx(counted.backward_peak_bytes, rel=0.01)


def test_peaks_do_not_depend_on_the_length() -> None:
    """From four chunks on, a longer sequence takes no more device memory beyond x, y, dy and dx."""
    method = Fpdt(chunk_tokens=CHUNK)

    short, long = (count_block(case(seq_len=count * CHUNK), method) for count in (4, 9))

    assert peaks(short) == peaks(long)


@pytest.mark.parametrize(
    ("count", "save_attention", "num_kv_heads", "device"),
    [
        (5, 0, 16, "cpu"),
        (6, 1, 4, "cuda"),
        (7, 0, 4, "cuda"),
        pytest.param(5, 1, 4, "cpu", marks=pytest.mark.slow),
        pytest.param(7, 1, 16, "cuda", marks=pytest.mark.slow),
        pytest.param(12, 0, 16, "cpu", marks=pytest.mark.slow),
        pytest.param(12, 1, 4, "cuda", marks=pytest.mark.slow),
    ],
)
def test_an_estimate_that_leaves_chunks_out_counts_as_if_it_ran_them(
    monkeypatch: pytest.MonkeyPatch, count: int, save_attention: int, num_kv_heads: int, device: Device
) -> None:
    """A step's memory, host memory, collectives, FLOPs and bytes of each operation are those of the full loops."""
    of = case(
        seq_len=count * 1024,
        num_kv_heads=num_kv_heads,
        device=device,
        dtype="float32" if device == "cpu" else "bfloat16",
        save_attention=save_attention,
    )
    sampled = step(of)

    monkeypatch.setattr("cpbench.world.estimate.sampled_tiles", nullcontext)
    full = step(of)

    assert len(full.trace.events) > len(sampled.trace.events)
    assert analysed(full) == analysed(sampled)
    assert totals(full) == totals(sampled)


def test_a_block_that_leaves_chunks_out_is_counted_as_if_it_ran_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks, host memory, bytes and calls, with both ways to recompute, for two sequences."""
    method = Fpdt(chunk_tokens=1024)
    of = case(seq_len=8 * 1024, batch_size=2, qk_norm=True, attention_bias=True)
    sampled = [counts(count_block(of, method, save_attention=saves)) for saves in (False, True)]

    monkeypatch.setattr("cpbench.block_count.sampled_tiles", nullcontext)

    assert sampled == [counts(count_block(of, method, save_attention=saves)) for saves in (False, True)]


@pytest.mark.parametrize("wrong", [wrong_row, rows_left_out])
def test_rows_that_stand_for_the_wrong_number_are_found(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[int], Iterator[int]]
) -> None:
    """The first row of those between has too few pairs to stand for them; a row left out sends too little."""
    of = case(seq_len=7 * 1024)
    expected = totals(step(of))

    monkeypatch.setattr("methods.fpdt.growing_rows", wrong)

    assert totals(step(of)) != expected


def test_the_number_of_chunks_hardly_changes_what_an_estimate_runs() -> None:
    """Beyond seven chunks nothing is added but numbers."""
    few, many = (count_block(case(seq_len=count * 1024), Fpdt(chunk_tokens=1024)) for count in (7, 41))

    assert len(few.timeline.events) == len(many.timeline.events)


def test_exchanges_and_copies_are_on_their_streams() -> None:
    """Chunks are exchanged among compute; they leave and come back beside it, and compute waits for them."""
    operations = [operation for _, operation in step(case(seq_len=5 * 1024)).trace.operations]
    chunk = [o for o in operations if any(scope.startswith("attention:") for scope in o.scope)]

    assert {o.stream for o in chunk if o.name == "all_to_all"} == {"communication"}
    assert {o.name for o in chunk if o.work == "copy"} == {"copy_in", "copy_out"}
    assert all(o.stream == o.name for o in chunk if o.work == "copy")
    waited = {id(other) for o in chunk if o.stream == "compute" for other in o.waits}
    assert all(id(o) in waited for o in chunk if o.stream in ("communication", "copy_in"))


@pytest.mark.parametrize(("num_kv_heads", "sums_fit"), [(4, True), (8, False)])
def test_host_memory_is_what_waits_for_backward(num_kv_heads: int, sums_fit: bool) -> None:
    """q, k, v, out and log-sum-exp, and beside them float32 dk, dv, unless these fit where q and out have waited."""
    count = 5
    of = case(seq_len=count * CHUNK, num_kv_heads=num_kv_heads)
    queries = of.tokens_per_rank * 16 * 128 * 2
    keys = queries * num_kv_heads // 16

    counted = count_block(of, Fpdt(chunk_tokens=CHUNK))

    waiting = 2 * queries + 2 * keys + of.seq_len * 4 * 4
    sums = 0 if sums_fit else 2 * 2 * keys * (count - 1) // count
    assert waiting + sums == counted.host_bytes


def test_saved_attention_is_not_computed_again() -> None:
    """With out in host memory the recomputation sends nothing; backward projects and sends q, k, v once more."""
    method, of = Fpdt(chunk_tokens=CHUNK), case(seq_len=3 * CHUNK)
    plain, saved = count_block(of, method), count_block(of, method, save_attention=True)

    inputs = plain.forward.bytes["all_to_all"] - of.tokens_per_rank * 16 * 128 * 2 * 3 // 4
    assert saved.recomputation.bytes == {}
    assert plain.backward.bytes["all_to_all"] + inputs == saved.backward.bytes["all_to_all"]
    assert peaks(plain) == peaks(saved)


@pytest.mark.parametrize("save_attention", [False, True])
def test_a_checkpointed_block_gives_the_gradients_of_a_plain_one(save_attention: bool) -> None:
    """First forward, recomputation and backward give bit for bit what forward and backward do."""
    block = Block()
    expected = block.gradients(block.forward())

    memo = Memo(block.host, save_attention=save_attention)
    with torch.no_grad():
        first = block.forward(memo)
    kept = dict(memo.kept)
    memo.recomputing = True
    again = block.forward(memo)

    assert torch.equal(first, again)
    assert bool(kept) == save_attention
    assert all(torch.equal(a, b) for a, b in zip(expected, block.gradients(again), strict=True))
    assert memo.kept == {}


def test_host_memory_does_not_grow_from_step_to_step() -> None:
    """Every slab of a step is free for the next, whether or not a backward follows."""
    block = Block()
    block.gradients(block.forward())
    after_one = block.host.bytes

    for _ in range(3):
        with torch.no_grad():
            block.forward()
            block.forward(Memo(block.host))
        block.gradients(block.forward())

    assert after_one == block.host.bytes


@pytest.mark.slow
def test_three_and_five_chunks_equal_the_reference() -> None:
    """Fewer KV heads than ranks, two sequences, qk-norm, in float32 biases too; alone and in a model."""
    shapes = tuple(
        Shape(
            world_size=2,
            num_heads=4,
            num_kv_heads=1,
            seq_len=60,
            batch_size=2,
            qk_norm=True,
            # A limit of bfloat16 says little over the few numbers of a bias of one narrow head.
            attention_bias=dtype == "float32",
            dtype=dtype,
        )
        for dtype in DTYPES
    )
    request = VerifyRequest(
        methods=("fpdt",),
        selection=Selection(shapes=shapes, stacks=dict.fromkeys(shapes, ("long",))),
        options={"fpdt": [{"chunk_tokens": chunk} for chunk in (20, 12)]},
    )

    results = verify(request).results

    assert [result.verdict for result in results] == ["pass"] * 4, [result.reason for result in results]
    assert all(
        (check.baseline is not None) == (result.shape.dtype == "bfloat16")
        for result in results
        for check in result.checks
        if check.name == "out"
    )


@pytest.mark.slow
def test_planted_faults_are_found() -> None:
    """A wrong token order leaks the future; a forgotten contribution to dk shows in the gradients, and only there."""
    shape = Shape(world_size=2, num_kv_heads=2)
    request = VerifyRequest(
        methods=("broken-fpdt-order", "broken-fpdt-keys"),
        selection=Selection(shapes=(shape,)),
        plugins=(BROKEN / "broken_fpdt_order.py", BROKEN / "broken_fpdt_keys.py"),
    )

    order, keys = verify(request).results

    assert {"causality", "out"} <= failed(order), order.reason
    assert {"dwk", "dx"} <= failed(keys), keys.reason
    assert not {"causality", "out", "dwq", "dwv", "dwo"} & failed(keys), keys.reason


def peaks(counted: BlockCount) -> tuple[int, int]:
    return counted.forward_peak_bytes, counted.backward_peak_bytes


def failed(result: Verification) -> set[str]:
    return {check.name for check in result.checks if not check.passed}


def step(of: Case) -> Traced:
    """A whole step of one layer in chunks of 1024 tokens."""
    return traced_step(of, Fpdt(chunk_tokens=1024), edges=())


def analysed(traced: Traced) -> tuple[object, ...]:
    """All that is known of a step's memory, but where in its scope each of the largest was made."""
    numbers = analyse(Timeline(traced.trace.events), step=STEP)
    return replace(numbers, largest=()), host_peak_bytes(traced.trace.events)


def totals(traced: Traced) -> dict[tuple[str, str, str], tuple[int, int, int]]:
    """(How often, FLOPs, bytes) by phase, stream and name of the operation."""
    result: dict[tuple[str, str, str], tuple[int, int, int]] = {}
    for _, o in traced.trace.operations:
        key = o.phase, o.stream, o.name
        calls, flops, size = result.get(key, (0, 0, 0))
        result[key] = calls + o.times, flops + o.times * o.flops, size + o.times * o.size
    return result


def counts(counted: BlockCount) -> BlockCount:
    """Without the events themselves, and collectives in no order: those of a tile come as often as it stands for."""
    forward, recomputation, backward = (
        replace(log, sequence=sorted(log.sequence))
        for log in (counted.forward, counted.recomputation, counted.backward)
    )
    return replace(
        counted, timeline=Timeline(), forward=forward, recomputation=recomputation, backward=backward
    )


class Block:
    """A block in three chunks on one rank, over real tensors, in a batch of two."""

    def __init__(self) -> None:
        of = case(
            seq_len=24, world_size=1, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=16, batch_size=2
        ).model_copy(update={"device": "cpu", "dtype": "float32"})
        self.method = Fpdt(chunk_tokens=8)
        device, recorder, alone = torch.device("cpu"), Recorder(), Group(size=1, rank=0)
        self.host = HostPool(device, Streams(device), recorder)
        self.ctx = AttentionContext(
            case=of,
            ulysses=alone,
            ring=alone,
            kernels=select_kernels(of),
            rope=Rope(self.method.layout(of, 0).segments, of.architecture.rope_theta),
            recorder=recorder,
            host=self.host,
        )
        generator = torch.Generator().manual_seed(0)
        shapes = [(2, 24, 16), (32, 16), (16, 16), (16, 16), (16, 32)]
        self.leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

    def forward(self, memo: Memo | None = None) -> Tensor:
        x, *weights = self.leaves
        return self.method.attention(x, AttentionWeights(*weights), replace(self.ctx, memo=memo))

    def gradients(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.leaves, torch.ones_like(y).contiguous())
