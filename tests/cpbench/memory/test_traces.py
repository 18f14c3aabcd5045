"""Timelines from the CPU allocator's real events and from a CUDA allocator snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cpbench.memory.categories import analyse
from cpbench.memory.cpu_trace import CpuTrace
from cpbench.memory.cuda_trace import timeline_of_snapshot
from cpbench.runtime.kernels import Kernels
from cpbench.runtime.recorder import Mark, Moment, Recorder


def test_the_cpu_peak_is_exact_to_the_byte() -> None:
    """The peak is the sum of what was really alive at once, inside and before the step."""
    recorder = Recorder()
    trace = CpuTrace(recorder)
    trace.start()
    kept = torch.empty(1000)  # 4000 bytes
    recorder.mark("sharded_parameters", kept)
    with recorder.scope("step:1"), recorder.scope("forward"):
        with recorder.scope("mlp"):
            a = torch.empty(2000)  # 8000 bytes
            b = torch.empty(500)  # 2000 bytes
        del a
        with recorder.scope("norm"):
            c = torch.empty(1500)  # 6000 bytes
    del b, c
    timeline = trace.stop()

    numbers = analyse(timeline, step="step:1")

    assert numbers.peak_bytes == 4000 + 8000 + 2000
    assert numbers.by_category == {"sharded_parameters": 4000, "mlp": 10000}
    assert timeline.unmatched_frees == 0


def test_a_missing_free_shows_in_the_peak() -> None:
    """The twin of the exact peak: a tensor that is kept alive by mistake makes the peak larger."""
    recorder = Recorder()
    trace = CpuTrace(recorder)
    trace.start()
    with recorder.scope("step:1"), recorder.scope("forward"):
        leak = torch.empty(2000)
        c = torch.empty(1500)
    numbers = analyse(trace.stop(), step="step:1")
    del leak, c

    assert numbers.peak_bytes == 8000 + 6000


def test_scopes_hold_in_the_backward_pass() -> None:
    """Allocations of an autograd function's backward carry the scopes opened around and inside it."""
    recorder = Recorder()

    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(node: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(node: object, *grads: torch.Tensor) -> torch.Tensor:
            with recorder.scope("attention:3"):
                return grads[0].clone()

    x = torch.ones(10_000, requires_grad=True)
    trace = CpuTrace(recorder)
    trace.start()
    with recorder.scope("step:1"), recorder.scope("backward"):
        Copy.apply(x).sum().backward()
    numbers = analyse(trace.stop(), step="step:1")

    assert numbers.attention_backward_peak == 40_000


def test_kernel_scratch_is_told_apart_from_kernel_outputs() -> None:
    """What the attention kernel allocates and frees inside is scratch; output and log-sum-exp are not."""
    recorder = Recorder()
    q, k, v = (torch.randn(1, 512, 4, 32) for _ in range(3))
    trace = CpuTrace(recorder)
    trace.start()
    with recorder.scope("step:1"), recorder.scope("forward"), recorder.scope("attention:0"):
        out, lse = Kernels("cpu-flash").forward(q, k, v, causal=True, scale=1.0)
    timeline = trace.stop()
    kept = [e.allocation for e in timeline.events if not e.is_free and not e.allocation.inside_kernel]
    scratch = [e.allocation for e in timeline.events if not e.is_free and e.allocation.inside_kernel]

    assert sorted(a.bytes for a in kept) == sorted([out.nbytes, lse.nbytes])
    assert scratch


OURS = ("/somewhere/methods/ring.py",)
KERNEL = ("/site-packages/torch/_ops.py", "/somewhere/cpbench/runtime/kernels.py", *OURS)


def entry(
    action: str, address: int, size: int, time_us: int, scope: str, files: Sequence[str] = OURS
) -> dict[str, Any]:
    frames = [{"filename": file, "line": 12, "name": "forward"} for file in files]
    return {
        "action": action,
        "addr": address,
        "size": size,
        "time_us": time_us,
        "user_metadata": scope,
        "frames": frames,
    }


def test_a_cuda_snapshot_gives_the_same_kind_of_timeline() -> None:
    """Blocks alive before, scopes from metadata, marks by address and time, reuse of an address after a free."""
    before = {
        "segments": [{"device": 0, "blocks": [{"state": "active_allocated", "address": 1, "size": 4096}]}]
    }
    attention = "step:1/forward/attention:0"
    trace = [
        entry("alloc", 10, 1024, 100, attention),
        entry("free_requested", 10, 1024, 110, attention),
        entry("free_completed", 10, 1024, 110, attention),
        entry("alloc", 10, 2048, 120, attention),
        entry("alloc", 20, 512, 130, "step:1/forward/mlp"),
        entry("free_completed", 99, 1, 140, ""),
    ]
    marks = [Mark(125_000, 10, "attention_output")]

    timeline = timeline_of_snapshot(before, trace, marks)
    numbers = analyse(timeline, step="step:1")

    assert numbers.peak_bytes == 4096 + 2048 + 512
    assert numbers.by_category == {"other": 4096, "residual": 2048, "mlp": 512}
    assert numbers.attention_forward_peak == 1024
    assert timeline.unmatched_frees == 1
    assert numbers.largest[1].site == "ring.py:12 forward"


def test_what_a_kernel_frees_itself_is_its_scratch() -> None:
    """Freed before anything else allocates: inside; freed after: a result of the kernel."""
    trace = [
        entry("alloc", 10, 100, 1, "step:1/forward/attention:0", KERNEL),
        entry("alloc", 20, 700, 2, "step:1/forward/attention:0", KERNEL),
        entry("free_completed", 20, 700, 3, "step:1/forward/attention:0"),
        entry("alloc", 30, 5, 4, "step:1/forward/attention:0"),
        entry("free_completed", 10, 100, 5, "step:1/forward/attention:0"),
    ]
    numbers = analyse(timeline_of_snapshot({}, trace, []), step="step:1")
    assert numbers.by_category == {"attention": 100, "kernel_scratch": 700}


def test_a_thread_that_still_has_the_path_of_its_last_step() -> None:
    """The path that the program had at the time counts, unless the thread's own was just open too."""
    moments = [
        Moment(1_000_000, "step:1"),
        Moment(1_100_000, "step:1/backward"),
        Moment(1_200_000, "step:1/backward/attention:0"),
        Moment(1_300_000, "step:1/backward"),
    ]
    trace = [
        entry("alloc", 1, 10, 1050, "step:0/backward"),  # stale
        entry("alloc", 2, 20, 1250, ""),  # a thread's first
        entry("alloc", 3, 40, 1301, "step:1/backward/attention:0"),  # a clock that is off by a little
        entry("alloc", 4, 80, 1400, "step:1/backward/attention:0"),  # stale
    ]
    timeline = timeline_of_snapshot({}, trace, [], moments=moments)
    assert [event.scope for event in timeline.events] == [
        ("step:1",),
        ("step:1", "backward", "attention:0"),
        ("step:1", "backward", "attention:0"),
        ("step:1", "backward"),
    ]


def test_fsdp_and_workspaces_on_cuda_have_the_categories_of_an_estimate() -> None:
    """FSDP by its files, the workspaces of matrix products by their addresses."""
    fsdp = "/site-packages/torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py"
    before = {
        "segments": [
            {
                "device": 0,
                "blocks": [
                    {"state": "active_allocated", "address": 1, "size": 32},
                    {"state": "active_allocated", "address": 2, "size": 64},
                    {"state": "inactive", "address": 3, "size": 128},
                ],
            }
        ]
    }
    gathered = entry(
        "alloc", 4, 256, 5, "step:1/forward", (fsdp, "/site-packages/torch/nn/modules/module.py")
    )
    reduced = entry("alloc", 5, 512, 6, "step:1/backward", (fsdp,))
    reduced["frames"][0]["name"] = "foreach_reduce"
    timeline = timeline_of_snapshot(before, [gathered, reduced], [], workspaces=frozenset({2}))
    assert analyse(timeline, step="step:1").by_category == {
        "other": 32,
        "workspace": 64,
        "unsharded_parameters": 256,
        "communication_buffers": 512,
    }
