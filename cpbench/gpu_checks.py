"""`make gpu`: what one GPU can show in a few minutes, as records and a short table.

    python -m cpbench.gpu_checks --out runs/gpu-checks [--skip STEP ...]

    kernels       every attention kernel against textbook attention
    rates         single operations, beside the time model's rates of the profile
    verify        `cpbench verify` of every method, with ranks as processes that share the device
    measured      training steps of a world of one under torchrun, and the signed error of the estimate of its peak
    fits          lengths around the longest that the estimate says fits: it may refuse what runs, but not the reverse
    throughput    the compute of two methods of an emulated rank, more steps
    sweep         one emulated rank, all methods, shorter lengths first; the signed error of the estimate of its peak

Each step has its own limit and all have one together; what a step found before its limit counts.  Nothing needs a
network.  `--device cpu` with a small model and `--dtype float32` runs the same without a GPU.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from cpbench import registry
from cpbench.gpu_findings import RUNS, Findings, table
from cpbench.launch import child_environment
from cpbench.machine import visible_gpus
from cpbench.supervise import GRACE_SECONDS
from cpbench.units import parse_length

_MADE = (*RUNS, "kernels.json", "rates.json", "verify.json", "records.jsonl", "table.txt")
_ALONE = "single"
"""The method of one rank: it does not belong in a sweep over a world."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """One `cpbench sweep` of emulated cases; name of its run, lengths, methods, layers."""

    name: str
    lengths: tuple[str, ...]
    methods: tuple[str, ...]
    layers: int
    steps: int = 1
    mode: str = "emulate"
    stack: str | None = None


@dataclass(slots=True)
class Checks:
    """The command line, and the clock that all steps share."""

    given: argparse.Namespace
    deadline: float
    failed: bool = False
    took: dict[str, float] = field(default_factory=dict)
    """Seconds of each step that ran."""

    def kernels(self) -> None:
        """Check attention kernels."""
        command = ["-m", "cpbench.parity.kernel_checks", "--device", self.given.device]
        command += ["--dtype", self.given.dtype, "--out", str(self.given.out / "kernels.json")]
        if self._run(command, self.given.kernels_limit) != 0:
            self.failed = True

    def rates(self) -> None:
        """Time single operations."""
        command = ["-m", "cpbench.timing.probe_rates", "--device", self.given.device]
        command += ["--hardware", self.given.hardware, "--out", str(self.given.out / "rates.json")]
        command += ["--scale", str(self.given.scale)]
        if self._run(command, self.given.rates_limit) != 0:
            self.failed = True

    def verify(self) -> None:
        """Check methods with real processes, which share the device where there are fewer."""
        command = [
            "-m",
            "cpbench",
            "verify",
            "--quick",
            "--block-only",
            "--json",
            "--device",
            self.given.device,
        ]
        command += ["--dtype", self.given.dtype, "--timeout", f"{self.given.verify_limit:.0f}"]
        command += ["--world", str(self.given.verify_world)]
        # First what nothing else here runs with several ranks.
        names = self.given.method or sorted(registry.method_files(), key=lambda name: name != "torch-ring")
        command += [item for name in names for item in ("--method", name)]
        if self._run(command, self.given.verify_limit + 20, output=self.given.out / "verify.json") != 0:
            self.failed = True

    def measured(self) -> None:
        """Train in a world of one, as `cpbench sweep` measures, and estimate the same."""
        measured = Sweep(
            name="measured",
            lengths=(self.given.measured_length,),
            methods=tuple(self.given.method) or (_ALONE, self.given.compare[0]),
            layers=self.given.layers,
            mode="measure",
        )
        self._all([measured, replace(measured, name="estimated", mode="estimate")], self.given.measured_limit)

    def fits(self) -> None:
        """Run one method at lengths around the longest that an estimate says fits, and estimate the same."""
        emulated = Sweep(
            name="fits",
            lengths=tuple(self.given.fit_length),
            methods=(self.given.compare[1],),
            layers=self.given.fit_layers,
            stack="plain",
        )
        self._all([replace(emulated, name="would-fit", mode="estimate"), emulated], self.given.fits_limit)

    def sweep(self) -> None:
        """Run what the lengths ask for, the shortest first, so that a limit costs the longest."""
        self._all(list(self.sweeps()), self.given.sweep_limit)

    def _all(self, sweeps: Sequence[Sweep], limit: float) -> None:
        """Run sweeps one after another within a limit."""
        end = time.monotonic() + limit
        for sweep in sweeps:
            left = end - time.monotonic()
            if left <= 0:
                self._say(f"{sweep.name}: no time left")
                self.failed = True
            elif self._sweep(sweep, left) != 0:
                self.failed = True

    def throughput(self) -> None:
        """Time two methods with more steps."""
        sweep = Sweep(
            name="throughput",
            lengths=(self.given.throughput_length,),
            methods=tuple(self.given.compare),
            layers=self.given.layers,
            steps=3,
        )
        if self._sweep(sweep, self.given.throughput_limit) != 0:
            self.failed = True

    def sweeps(self) -> Iterator[Sweep]:
        """Yield the parts of the sweep; the longest length has one layer and the two methods that are compared."""
        methods = tuple(self.given.method) or tuple(n for n in registry.method_files() if n != _ALONE)
        lengths = sorted(self.given.length, key=parse_length)
        for position, length in enumerate(lengths):
            longest = position == len(lengths) - 1 and len(lengths) > 1
            yield Sweep(
                name=f"sweep-{length}",
                lengths=(length,),
                methods=tuple(m for m in reversed(self.given.compare) if m in methods)
                if longest
                else methods,
                layers=self.given.layers if position == 0 else 1,
            )

    def _sweep(self, sweep: Sweep, limit: float) -> int | None:
        given, mode = self.given, sweep.mode
        world = 1 if self._alone(sweep) else given.world
        command = ["-m", "cpbench", "sweep", "--mode", mode, "--device", given.device]
        command += ["--model", given.model, "--dtype", given.dtype, "--layers", str(sweep.layers)]
        if mode == "emulate":
            command += ["--rank", str(given.rank)]
        if mode != "measure":
            command += ["--hardware", given.hardware]
        if sweep.stack is not None:
            command += ["--stack", sweep.stack]
        command += ["--world", str(world)]
        command += ["--method", ",".join(sweep.methods), "--seqlen", ",".join(sweep.lengths)]
        command += [
            "--steps",
            str(sweep.steps),
            "--warmup",
            "0",
            "--runs",
            str(given.out),
            "--name",
            sweep.name,
        ]
        return self._run(command, limit)

    @staticmethod
    def _alone(sweep: Sweep) -> bool:
        """Whether a sweep is about a world of one: what one GPU can measure, and its estimate."""
        return sweep.name in ("measured", "estimated")

    def _run(self, command: Sequence[str], limit: float, output: Path | None = None) -> int | None:
        """Run a step of ours, its output to a file if one is given; None when its limit came first."""
        limit = min(limit, self.deadline - time.monotonic())
        if limit <= 0:
            self._say("no time left")
            return None
        environment = child_environment(1, single_node=True)
        with output.open("wb") if output else nullcontext() as stdout:
            process = subprocess.Popen(
                [sys.executable, *command], env=environment, start_new_session=True, stdout=stdout
            )
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            self._say(f"the limit of {limit:.0f} s has come")
            process.send_signal(signal.SIGINT)  # a sweep ends its case and keeps its records
            try:
                process.wait(timeout=2 * GRACE_SECONDS + 5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return None
        except BaseException:
            process.terminate()
            process.wait()
            raise

    def _say(self, words: str) -> None:
        sys.stdout.write(f"{words}\n")
        sys.stdout.flush()


_STEPS: dict[str, Callable[[Checks], None]] = {
    "kernels": Checks.kernels,
    "rates": Checks.rates,
    "verify": Checks.verify,
    "measured": Checks.measured,
    "fits": Checks.fits,
    "throughput": Checks.throughput,
    "sweep": Checks.sweep,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps, print the table, and return the exit code.

    0: every step did all its work and passed, and no estimate is further off than `BAR`; 1: not so; 2: no GPU.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cpbench.gpu_checks", description="What one GPU can show in a few minutes."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gpu-checks"),
        help="folder; what an earlier call left there is removed",
    )
    parser.add_argument("--skip", action="append", default=[], choices=_STEPS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default="llama3-8b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--hardware", default="h100-80g", help="whose communication is modelled")
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--layers", type=int, default=2, help="at the shortest length and for the throughput")
    parser.add_argument("--method", action="append", default=[], help="repeatable; default: all")
    parser.add_argument("--length", action="append", default=[], help="repeatable; default: 128K, 1M")
    parser.add_argument("--compare", nargs=2, default=["upipe", "ulysses"], metavar="METHOD")
    parser.add_argument("--throughput-length", default="256K")
    parser.add_argument("--limit", type=float, default=530.0, help="seconds for everything")
    parser.add_argument("--kernels-limit", type=float, default=60.0)
    parser.add_argument("--sweep-limit", type=float, default=400.0)
    parser.add_argument("--throughput-limit", type=float, default=100.0)
    parser.add_argument("--rates-limit", type=float, default=60.0)
    parser.add_argument("--verify-limit", type=float, default=120.0)
    parser.add_argument("--verify-world", type=int, default=4)
    parser.add_argument("--measured-limit", type=float, default=100.0)
    parser.add_argument("--measured-length", default="32K")
    parser.add_argument("--fits-limit", type=float, default=100.0)
    parser.add_argument("--fit-length", action="append", default=[], help="repeatable; default: 174K, 186K")
    parser.add_argument("--fit-layers", type=int, default=8)
    parser.add_argument("--scale", type=int, default=1, help="divides the sizes of the rates step")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not visible_gpus()[0]:
        sys.stderr.write(
            "error: these checks need a visible GPU, and there is none; --device cpu tries them without\n"
        )
        return 2
    given.out = given.out.absolute()
    given.length = given.length or ["128K", "1M"]
    given.fit_length = given.fit_length or ["174K", "186K"]
    given.out.mkdir(parents=True, exist_ok=True)
    for pattern in _MADE:
        for path in given.out.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    checks = Checks(given, deadline=time.monotonic() + given.limit)
    for name, step in _STEPS.items():
        if name not in given.skip:
            began = time.monotonic()
            step(checks)
            checks.took[name] = time.monotonic() - began
    found = Findings(given.out)
    checks.failed |= found.failed
    records = [record for name in RUNS for record in found.records(name)]
    text = table(found, given, checks.took)
    (given.out / "table.txt").write_text(text, encoding="utf-8")
    lines = [record.model_dump_json() + "\n" for record in records]
    (given.out / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    sys.stdout.write(text)
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
