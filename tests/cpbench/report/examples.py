"""Makes realistic records without running anything: the shape of a real sweep, by the real record models.

`python -m tests.cpbench.report.examples FOLDER` writes the example runs and their reports, to look at.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cpbench.case import STACKS, Case
from cpbench.explanation import Anatomy, CategoryEffect, Explanation, Moment, OptionEffect, PeakTensors
from cpbench.machine import Gpu, Machine
from cpbench.model_config import PRESETS
from cpbench.record import (
    Memory,
    RankReport,
    Record,
    Software,
    Status,
    StepSample,
    WorkerReport,
    write_record,
)
from cpbench.units import GIB, MIB

LAPTOP = Machine(
    name="cpu-2x-intel-xeon-processor",
    os="Linux 6.8.0",
    python="3.11.9",
    cpu="Intel Xeon Processor @ 2.60GHz",
    cpu_count=2,
    host_memory_bytes=16 * GIB,
)
NODE = Machine(
    name="8x-h100-80gb-hbm3",
    os="Linux 6.5.0",
    python="3.12.3",
    cpu="AMD EPYC 9654",
    cpu_count=192,
    host_memory_bytes=1900 * GIB,
    gpus=(Gpu(name="NVIDIA H100 80GB HBM3", memory_bytes=80 * GIB),) * 8,
    driver="560.35.03",
)

# Peak of attention intermediates in units of [tokens per rank x attention width x bytes], and relative speed.
_ATTENTION = {
    "single": 6.0,
    "ring": 7.0,
    "torch-ring": 9.5,
    "ulysses": 8.2,
    "usp": 7.4,
    "fpdt": 3.1,
    "upipe": 2.3,
}
_SPEED = {
    "single": 1.0,
    "ring": 0.86,
    "torch-ring": 0.74,
    "ulysses": 0.97,
    "usp": 0.92,
    "fpdt": 0.7,
    "upipe": 0.95,
}


def make_case(method: str = "ring", **changes: object) -> Case:
    """A case of the smoke sweep with changes."""
    model = changes.pop("model", "tiny")
    stack = changes.pop("stack", "checkpoint")
    fields: dict[str, Any] = {
        "method": method,
        "model": model,
        "architecture": changes.pop("architecture", None) or PRESETS[model if model in PRESETS else "tiny"],
        "seq_len": 1024,
        "world_size": 1 if method == "single" else 4,
        "dtype": "float32",
        "stack": STACKS[stack] if isinstance(stack, str) else stack,
    }
    return Case(**(fields | changes))


def facts(machine: Machine | None = LAPTOP, **changes: object) -> dict[str, Any]:
    """The provenance of a record."""
    return {
        "machine": machine,
        "cpbench_version": "0.1.0",
        "git_commit": "fb16e7bc4817",
        "method_source_hash": "0123456789ab",
        "started": "2026-02-03T10:00:00Z",
        "duration_seconds": 12.5,
    } | changes


def make_record(
    case: Case, machine: Machine | None = LAPTOP, *, loss: float | None = None, **changes: object
) -> Record:
    """A finished record with plausible numbers, the same for the same case."""
    luck = random.Random(case.case_id)
    gpu = machine is not None and bool(machine.gpus) and case.device == "cuda"
    report = WorkerReport(
        ranks=tuple(_rank(case, rank, luck, gpu, loss) for rank in range(case.world_size)),
        software=Software(torch="2.13.0", cuda="13.0" if gpu else None, nccl="2.28.3" if gpu else None),
        gpu="NVIDIA H100 80GB HBM3" if gpu else None,
    )
    record = Record.from_ranks(case, report, facts(machine))
    return record.model_copy(update=changes)


def make_failure(
    case: Case, status: Status, reason: str, machine: Machine | None = LAPTOP, **changes: object
) -> Record:
    """A record without numbers."""
    return Record.without_result(case, status, reason, facts(machine, duration_seconds=3.0)).model_copy(
        update=changes
    )


def smoke_records() -> list[Record]:
    """Four methods at three lengths on CPU, everything finished: what `make demo` gives."""
    return [
        make_record(make_case(method, seq_len=seq_len))
        for method in ("single", "ring", "ulysses", "upipe")
        for seq_len in (1024, 2048, 4096)
    ]


def long_records() -> list[Record]:
    """Seven methods from 128K to 5M on 8 GPUs, with the failures that such a sweep has."""
    limits = {"torch-ring": 2**20, "single": 2**18, "ring": 3 * 2**20, "ulysses": 3 * 2**20, "usp": 4 * 2**20}
    records = []
    for method in _ATTENTION:
        for seq_len in (2**17, 2**18, 2**19, 2**20, 2 * 2**20, 3 * 2**20, 4 * 2**20, 5 * 2**20):
            world = 1 if method == "single" else 8
            case = make_case(
                method,
                seq_len=seq_len,
                world_size=world,
                model="llama3-8b",
                stack="long",
                dtype="bfloat16",
                device="cuda",
            )
            if seq_len <= limits.get(method, 5 * 2**20):
                records.append(make_record(case, NODE))
            elif method == "fpdt":
                records.append(make_failure(case, "oom_host", "the host has 1.9 TiB", NODE))
            else:
                reason = "CUDA out of memory on rank 3: tried to allocate 20.00 GiB\n" + _LOG
                records.append(make_failure(case, "oom_device", reason, NODE))
    odd = make_case(
        "usp", seq_len=2**17, world_size=6, model="llama3-8b", stack="long", dtype="bfloat16", device="cuda"
    )
    reason = "usp: num_heads=32 is not divisible by ulysses_degree=6; choose 1, 2, 4, 8 or 16"
    return [*records, make_failure(odd, "unsupported", reason, NODE)]


def mixed_records() -> list[Record]:
    """One question measured on GPUs and CPU, emulated and estimated, in two dtypes: nothing may be joined."""
    records = []
    for method in ("ring", "upipe"):
        for seq_len in (4096, 8192, 16384):
            for dtype in ("float32", "bfloat16"):
                case = make_case(method, seq_len=seq_len, dtype=dtype)
                records.append(make_record(case))
                gpu = {"seq_len": seq_len, "dtype": dtype, "device": "cuda"}
                records.append(make_record(make_case(method, **gpu), NODE))
                records.append(
                    make_record(make_case(method, **gpu, mode="emulate", hardware="h100-80g"), NODE)
                )
                records.append(
                    make_record(make_case(method, **gpu, mode="estimate", hardware="h100-80g"), LAPTOP)
                )
    return records


def troubled_records() -> list[Record]:
    """A small run in which most things went wrong, among them a wrong loss and a plug-in."""
    records = [
        make_record(make_case(method, seq_len=n)) for method in ("single", "ring") for n in (1024, 2048, 4096)
    ]
    records.append(make_record(make_case("ulysses", seq_len=1024)))
    records.append(make_record(make_case("ulysses", seq_len=2048), loss=5.5))
    records.append(
        make_failure(make_case("ulysses", seq_len=4096), "timeout", "no end after 1800 s\n" + _LOG)
    )
    records.append(
        make_failure(make_case("upipe", seq_len=1024), "unsupported", "upipe: stage_heads=3 does not fit")
    )
    records.append(
        make_failure(make_case("upipe", seq_len=2048), "error", "rank 2 ended with SIGKILL\n" + _LOG)
    )
    records.append(
        make_failure(make_case("upipe", seq_len=4096), "invalid", "the loss of step 1 is not finite")
    )
    for stage in (4, 8):
        records += [
            make_record(make_case("my-method", seq_len=n, options={"stage": stage}))
            for n in (1024, 2048, 4096)
        ]
    doubt = "first loss 9.120 is far from ln(vocabulary) = 6.929"
    records[0] = records[0].model_copy(update={"warnings": (doubt,)})
    return records


def write_run(folder: Path, records: Iterable[Record], **run_json: object) -> Path:
    """Write a run folder and return it."""
    (folder / "cases").mkdir(parents=True)
    for record in records:
        write_record(record, folder / "cases" / f"{record.case_id}.json")
    if run_json:
        (folder / "run.json").write_text(json.dumps(run_json), encoding="utf-8")
    return folder


def make_explanation(case: Case, *, site: str = "upipe.py:398 forward") -> Explanation:
    """What `cpbench explain` could say of a case."""
    sizes = {"sharded_parameters": 4 * GIB, "optimizer": 8 * GIB, "attention": 6 * GIB, "mlp": GIB}
    moments = [
        Moment(
            at=at,
            phase=("forward", "backward", "optimizer")[at // 40],
            place=f"block:{at % 32}",
            by_category={name: size if at == 60 else size // (1 + at % 3) for name, size in sizes.items()},
        )
        for at in range(0, 120, 2)
    ]
    peak = sum(sizes.values())
    tensors = [
        PeakTensors(
            count=1 + index,
            bytes=size // (1 + index),
            category=name,
            site=site,
            made_in="step/backward/attention",
            shape=(1, 131072, 4096) if index % 2 else None,
            dtype="bfloat16" if index % 2 else None,
            peak_without_bytes=peak - size,
        )
        for index, (name, size) in enumerate(sizes.items())
    ]
    return Explanation(
        case=case,
        anatomy=Anatomy(
            peak_bytes=peak,
            host_bytes=3 * GIB,
            peak=next(moment for moment in moments if moment.at == 60),
            timeline=tuple(moments),
            events=120,
            categories=tuple(
                CategoryEffect(name=n, bytes=s, peak_without_bytes=peak - s, phase_without="backward")
                for n, s in sizes.items()
            ),
            tensors=tuple(tensors),
            unlisted_bytes=MIB,
        ),
        options=(
            OptionEffect(option="tile_mlp", value="false", peak_bytes=peak + GIB, host_bytes=3 * GIB),
            OptionEffect(option="offload", value="none", peak_bytes=None, reason="needs full checkpointing"),
        ),
        device_bytes=int(75.9 * GIB),
    )


def _rank(case: Case, rank: int, luck: random.Random, gpu: bool, loss: float | None) -> RankReport:
    arch = case.architecture
    size = 2 if case.dtype == "bfloat16" else 4
    tokens = case.seq_len // case.world_size * case.batch_size
    width = tokens * arch.attention_dim * size
    attention = int(width * _ATTENTION.get(case.method, 4.0) * (1 + 0.02 * rank / case.world_size))
    params = arch.num_params // case.world_size
    categories = {
        "sharded_parameters": params * 4,
        "gradients": params * 4,
        "optimizer": params * 8,
        "unsharded_parameters": (arch.layer_matrix_params + arch.vocab_size * arch.hidden_dim) * size,
        "residual": 0
        if case.stack.offload == "inputs"
        else arch.num_layers * tokens * arch.hidden_dim * size,
        "attention": attention,
        "mlp": int(tokens * arch.ffn_dim * size * (0.1 if case.stack.tile_mlp else 2.2)),
        "loss": int(tokens * arch.vocab_size * 4 * (0.001 if case.stack.tile_loss else 1)),
        "communication_buffers": 0 if case.world_size == 1 else width // 3,
        "kernel_scratch": int(width * 0.6),
        "other": int(width * 0.1),
    }
    peak = sum(categories.values())
    rate = ((400e12 if size == 2 else 30e12) if gpu else 45e9) * _SPEED.get(case.method, 0.8)
    seconds = arch.step_flops(case.seq_len, case.batch_size) / case.world_size / rate
    samples = []
    for _ in range(case.steps):
        noisy = seconds * luck.uniform(1.0, 1.05)
        parts = {
            "forward_seconds": noisy * 0.27,
            "backward_seconds": noisy * 0.69,
            "optimizer_seconds": noisy * 0.04,
        }
        samples.append(StepSample(step_seconds=noisy, **parts))
    wobble = 1 + (1e-6 if size == 4 else 3e-3) * random.Random(case.method).random()
    losses = tuple(
        (math.log(arch.vocab_size) - 0.04 * step) * wobble for step in range(case.warmup + case.steps)
    )
    if loss is not None:
        losses = (*losses[:-1], loss)
    reserved = int(peak * 1.06) if gpu else None
    memory = Memory(
        peak_allocated_bytes=peak,
        peak_reserved_bytes=reserved,
        device_used_bytes=reserved + 1400 * MIB if reserved else None,
        non_torch_bytes=1400 * MIB if reserved else None,
        host_rss_peak_bytes=600 * MIB + (0 if gpu else peak),
        host_pinned_peak_bytes=arch.num_layers * tokens * arch.hidden_dim * size
        if case.stack.offload == "inputs"
        else 0,
        attention_intermediate_peak_bytes=attention,
        attention_forward_peak_bytes=attention // 2,
        attention_backward_peak_bytes=attention,
        peak_by_category_bytes=categories,
        peak_by_phase_bytes={"forward": int(peak * 0.8), "backward": peak, "optimizer": int(peak * 0.6)},
    )
    return RankReport(
        rank=rank,
        memory=memory,
        samples=tuple(samples),
        losses=losses,
        grad_norms=tuple(1.5 for _ in losses),
        collective_bytes={} if case.world_size == 1 else {"all_to_all": width * 4, "all_gather": params * 8},
        collective_calls={} if case.world_size == 1 else {"all_to_all": 12, "all_gather": 9},
        attention_backend="cuda-flash" if gpu else "cpu-flash",
    )


_LOG = """last lines of rank 3:
  File "cpbench/train.py", line 120, in step
    loss.backward()
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 3 has a total of 79.10 GiB"""


if __name__ == "__main__":
    from cpbench.report import build

    target = Path(sys.argv[1])
    runs = {
        "smoke": smoke_records(),
        "long-context": long_records(),
        "mixed": mixed_records(),
        "troubled": troubled_records(),
    }
    for name, examples in runs.items():
        run = write_run(
            target / "runs" / name,
            examples,
            command=["cpbench", "sweep", "--scenario", name],
            scenario={"name": name, "description": "Which method needs least memory as the context grows?"},
            case_ids=[record.case_id for record in examples],
            start="2026-02-03T10:00:00Z",
            end="2026-02-03T10:04:12Z",
        )
        build([run], target / "reports" / name)
