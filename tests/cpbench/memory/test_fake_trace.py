"""Storages of fake tensors, held against the CPU allocator's own events for the same program."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cpbench.memory.categories import MemoryNumbers, analyse
from cpbench.memory.cpu_trace import CpuTrace
from cpbench.memory.fake_trace import FakeTrace
from cpbench.runtime.kernels import Kernels, cpu_scratch_is_known, scratch_bytes
from cpbench.runtime.recorder import Recorder

Program = Callable[[Recorder], None]


def program(recorder: Recorder) -> None:
    """A step with a graph, a view, a storage that is emptied and filled again, and a mark."""
    weight = torch.ones(300, 200, requires_grad=True)
    recorder.mark("sharded_parameters", weight.detach())
    with recorder.scope("step:1"):
        with recorder.scope("forward"):
            x = torch.ones(400, 300)
            y = (x @ weight).relu()
            view = y[:10].t()
            scratch = torch.empty(5000)
            scratch.untyped_storage().resize_(0)
        with recorder.scope("backward"), recorder.scope("attention:0"):
            scratch.untyped_storage().resize_(12_000)
            (y.sum() + view.sum()).backward()


def measured(run: Program) -> MemoryNumbers:
    recorder = Recorder()
    trace = CpuTrace(recorder)
    trace.start()
    run(recorder)
    return analyse(trace.stop(), step="step:1")


def estimated(run: Program) -> MemoryNumbers:
    recorder = Recorder()
    with FakeTensorMode(), FakeTrace(recorder) as trace:
        run(recorder)
    return analyse(trace.timeline, step="step:1")


def test_the_fake_peak_is_the_allocators_peak() -> None:
    """Peak, phases and categories of the estimate equal the measurement to the byte."""
    real, fake = measured(program), estimated(program)

    assert fake.peak_bytes == real.peak_bytes
    assert fake.by_phase == real.by_phase
    assert fake.by_category == real.by_category
    assert fake.attention_backward_peak == real.attention_backward_peak > 0


def test_a_program_that_keeps_more_has_a_higher_fake_peak() -> None:
    """The twin: keeping one more tensor alive shows, by exactly its bytes."""

    def keeping(recorder: Recorder) -> None:
        kept = torch.empty(1000)
        program(recorder)
        del kept

    assert estimated(keeping).peak_bytes == estimated(program).peak_bytes + 4000


def test_flash_attention_scratch_follows_its_source() -> None:
    """FlashAttention-2's backward: float32 dq over rounded rows and widths, row sums, and for GQA wide dk, dv."""
    q, k = torch.empty(1, 200, 8, 48, dtype=torch.bfloat16), torch.empty(1, 200, 2, 48, dtype=torch.bfloat16)
    backward = torch.ops.cpbench.attention_backward.default

    def scratch(keys: torch.Tensor, backend: str) -> int:
        return scratch_bytes(backward, (q, q, keys, keys, q, q, True, 1.0, backend))

    rounded = 256 * 8 * (64 + 1) * 4
    assert scratch(q, "cuda-flash") == rounded
    assert scratch(k, "cuda-flash") == rounded + 2 * 200 * 8 * 48 * 2
    assert scratch_bytes(torch.ops.cpbench.attention_forward.default, (q, k, k, True, 1.0, "cuda-flash")) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(20, 20), (104, 104), (416, 416), (1000, 1000), (900, 300)])
def test_scratch_of_the_cpu_kernel_is_what_the_allocator_says(
    dtype: torch.dtype, queries: int, keys: int
) -> None:
    """Forward and backward allocate inside exactly what the formula says, for every tile size and both dtypes."""
    if not cpu_scratch_is_known(dtype):
        pytest.skip("oneDNN packs bfloat16 operands on this processor, in sizes that only it knows")
    q, k, v = (torch.randn(2, n, 4, 24).to(dtype) for n in (queries, keys, keys))
    kernels = Kernels("cpu-flash")
    out, lse = kernels.forward(q, k, v, causal=False, scale=1.0)

    def inside(run: Callable[[], object]) -> int:
        recorder = Recorder()
        trace = CpuTrace(recorder)
        trace.start()
        run()
        events = trace.stop().events
        return sum(e.allocation.bytes for e in events if not e.is_free and e.allocation.inside_kernel)

    forward = inside(lambda: kernels.forward(q, k, v, causal=False, scale=1.0))
    backward = inside(lambda: kernels.backward(out, q, k, v, out, lse, causal=False, scale=1.0))

    ops, tail = torch.ops.cpbench, (False, 1.0, "cpu-flash")
    assert forward == scratch_bytes(ops.attention_forward.default, (q, k, v, *tail))
    assert backward == scratch_bytes(ops.attention_backward.default, (out, q, k, v, out, lse, *tail))
