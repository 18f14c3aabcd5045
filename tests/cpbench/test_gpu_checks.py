"""`make gpu` without a GPU: its steps on CPU, its limits, its verdicts, its table."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import typer

from cpbench import gpu_checks, registry
from cpbench.cli import app
from cpbench.gpu_checks import Checks, Sweep, main
from cpbench.kernel_finding import KernelFinding, KernelFindings
from cpbench.rate_probe import RateProbe, RateProbes
from cpbench.record import Record, Status
from cpbench.shape import Shape
from cpbench.units import MIB
from cpbench.verification import Verdict, Verification, VerifyReport
from tests.cpbench.report.examples import make_case, make_failure, make_record
from tests.cpbench.workers.harness import ROOT

STEPS = ("kernels", "rates", "verify", "measured", "fits", "throughput", "sweep")
TINY = ["--device", "cpu", "--model", "tiny", "--dtype", "float32", "--world", "2", "--rank", "1"]
EMULATED = make_record(make_case("ulysses", mode="emulate", rank=0))
GOOD = VerifyReport.of("cpu", [Verification(method="ring", shape=Shape(), verdict="pass")])


def only(*steps: str) -> list[str]:
    """Arguments that skip every other step."""
    return [f"--skip={step}" for step in STEPS if step not in steps]


class FakeRuns:
    """Stands in for the processes of the steps: what each leaves in the folder, and how it ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.records: dict[str, list[Record]] = {}
        """By name of the sweep."""
        self.findings: list[KernelFinding] = []
        self.probes: list[RateProbe] = []
        self.report = GOOD
        self.codes: dict[str, int | None] = {}
        """By step or name of the sweep; 0 where nothing is said."""
        self.commands: list[tuple[str, ...]] = []
        self.swept: list[Sweep] = []
        runs = self

        def run(
            checks: Checks, command: Sequence[str], limit: float, output: Path | None = None
        ) -> int | None:
            runs.commands.append(tuple(command))
            out = checks.given.out
            if "cpbench.parity.kernel_checks" in command:
                (out / "kernels.json").write_bytes(KernelFindings.dump_json(runs.findings))
                return runs.codes.get("kernels", 0)
            if "cpbench.timing.probe_rates" in command:
                (out / "rates.json").write_bytes(RateProbes.dump_json(runs.probes))
                return runs.codes.get("rates", 0)
            if "verify" in command:
                assert output is not None
                output.write_text(runs.report.model_dump_json(), encoding="utf-8")
                return runs.codes.get("verify", 0)
            name = command[command.index("--name") + 1]
            folder = out / name / "cases"
            folder.mkdir(parents=True)
            for index, record in enumerate(runs.records.get(name, [])):
                (folder / f"{index}.json").write_text(record.model_dump_json(), encoding="utf-8")
            return runs.codes.get(name, 0)

        monkeypatch.setattr(Checks, "_run", run)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    return FakeRuns(monkeypatch)


def checked(folder: Path, *arguments: str) -> tuple[int, str]:
    """Return the exit code and the table."""
    code = main([*TINY, "--out", str(folder), *arguments])
    return code, (folder / "table.txt").read_text(encoding="utf-8")


def record(method: str, status: Status = "ok", peak: int = 100, **changes: object) -> Record:
    """A record of a world of one; its peak is stated."""
    case = make_case(method, world_size=1, **changes)
    if status != "ok":
        return make_failure(case, status, "a reason")
    return make_record(case, peak_allocated_bytes=peak, estimated_peak_bytes=None)


def test_the_steps_are_these() -> None:
    """In this order, the cheap ones first."""
    assert tuple(gpu_checks._STEPS) == STEPS


def test_everything_can_be_left_out(tmp_path: Path, runs: FakeRuns) -> None:
    """Nothing runs, nothing fails, and the table says so of every step."""
    code, table = checked(tmp_path, *only())

    assert code == 0
    assert table.count("not run") == len(STEPS)
    assert runs.commands == []


def test_a_step_without_time_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No time left: no step starts, and the exit code is 1."""
    assert main([*TINY, "--out", str(tmp_path), "--limit", "0"]) == 1
    assert "no time left" in capsys.readouterr().out
    assert not list(tmp_path.glob("sweep-*"))


def test_only_what_an_earlier_call_left_is_removed(tmp_path: Path, runs: FakeRuns) -> None:
    """Files and runs that a call makes are made anew or gone; everything else in the folder stays."""
    mine = ("mine.txt", "kernels.json.old", "measured-by-me/cases/1.json", "sweeps/1.json", "records.json")
    made = ("table.txt", "records.jsonl", "kernels.json", "rates.json", "verify.json")
    folders = ("measured", "estimated", "fits", "would-fit", "throughput", "sweep-1K")
    for name in (*mine, *made, *(f"{folder}/cases/old.json" for folder in folders)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old", encoding="utf-8")

    checked(tmp_path, *only())

    assert all((tmp_path / name).read_text(encoding="utf-8") == "old" for name in mine)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*mine, "table.txt", "records.jsonl"}
    assert "old" not in (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert (tmp_path / "records.jsonl").read_bytes() == b""


def test_all_that_is_made_is_known(tmp_path: Path, runs: FakeRuns) -> None:
    """A call that runs every step leaves nothing that the next would not remove."""
    checked(tmp_path, "--length=1K", "--length=2K")

    found = {path for pattern in gpu_checks._MADE for path in tmp_path.glob(pattern)}
    assert found == set(tmp_path.iterdir())
    assert {path.name for path in found} >= {"verify.json", "would-fit", "sweep-2K", "table.txt"}


def test_without_a_gpu_it_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line; what lies in the folder stays."""
    (tmp_path / "table.txt").write_text("old", encoding="utf-8")
    monkeypatch.setattr(gpu_checks, "visible_gpus", lambda: ((), None))

    assert main(["--out", str(tmp_path)]) == 2
    assert "need a visible GPU" in capsys.readouterr().err
    assert (tmp_path / "table.txt").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize(
    "failing", [*STEPS[:3], "measured", "estimated", "fits", "would-fit", "throughput", "sweep-1K"]
)
@pytest.mark.parametrize("code", [1, None])
def test_a_step_that_fails_is_a_failure(
    failing: str, code: int | None, tmp_path: Path, runs: FakeRuns
) -> None:
    """By its exit code or its limit; the steps after it run all the same, and all is well without it."""
    assert checked(tmp_path, "--length=1K")[0] == 0
    whole = len(runs.commands)
    runs.codes[failing] = code

    assert checked(tmp_path, "--length=1K")[0] == 1
    assert len(runs.commands) == 2 * whole


def test_commands_are_of_the_command_line(tmp_path: Path, runs: FakeRuns) -> None:
    """Every flag that a step gives `cpbench` is one of its flags, and each step asks for what it should."""
    checked(tmp_path, "--length=1K", "--scale=64")
    commands: Mapping[str, typer.core.TyperCommand] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

    ours = [command[2:] for command in runs.commands if command[:2] == ("-m", "cpbench")]
    assert {command[0] for command in ours} == {"verify", "sweep"}
    for name, *rest in ours:
        known = {flag for parameter in commands[name].params for flag in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known
    (verify,) = (command for command in ours if command[0] == "verify")
    assert {"--quick", "--block-only", "--json"} <= set(verify)
    named = [verify[k + 1] for k, word in enumerate(verify) if word == "--method"]
    assert named[0] == "torch-ring"
    assert sorted(named) == sorted(registry.method_files())
    modes = {
        command[command.index("--name") + 1]: (
            command[command.index("--mode") + 1],
            command[command.index("--world") + 1],
            "--rank" in command,
        )
        for command in ours
        if command[0] == "sweep"
    }
    assert modes == {
        "measured": ("measure", "1", False),
        "estimated": ("estimate", "1", False),
        "fits": ("emulate", "2", True),
        "would-fit": ("estimate", "2", False),
        "throughput": ("emulate", "2", True),
        "sweep-1K": ("emulate", "2", True),
    }
    (probe,) = (command for command in runs.commands if command[1] == "cpbench.timing.probe_rates")
    assert probe[probe.index("--scale") + 1] == "64"


@pytest.mark.parametrize(("estimated", "code"), [(100, 0), (103, 0), (99, 0), (104, 1), (98, 1)])
def test_an_estimate_that_is_too_far_off_is_a_failure(
    estimated: int, code: int, tmp_path: Path, runs: FakeRuns
) -> None:
    """Further than -1 or +3 %: exit code 1, after the table and the records are written."""
    changes = {"peak_allocated_bytes": 100, "estimated_peak_bytes": estimated}
    runs.records["sweep-1K"] = [EMULATED.model_copy(update=changes)]

    found, table = checked(tmp_path, *only("sweep"), "--length=1K")

    assert found == code
    assert (" !" in table) == bool(code)
    assert (tmp_path / "records.jsonl").read_text(encoding="utf-8").count("\n") == 1


@pytest.mark.parametrize(("estimated", "code"), [(1000, 0), (1030, 0), (990, 0), (1031, 1), (989, 1)])
def test_what_is_measured_is_held_against_its_estimate(
    estimated: int, code: int, tmp_path: Path, runs: FakeRuns
) -> None:
    """By method, from the two runs; a method beside it that is right does not hide the one that is off."""
    runs.records["measured"] = [record("single", peak=1000), record("ring", peak=5000)]
    runs.records["estimated"] = [record("ring", peak=5000), record("single", peak=estimated)]

    found, table = checked(tmp_path, *only("measured"))

    assert found == code
    (line,) = (line for line in table.splitlines() if line.startswith("  single  1K"))
    assert (" !" in line) == bool(code)
    assert f"{estimated / 10 - 100:+.2f}%" in line
    (line,) = (line for line in table.splitlines() if line.startswith("  ring  1K"))
    assert "+0.00%" in line
    assert " !" not in line


def test_what_was_not_measured_or_not_estimated_has_no_error(tmp_path: Path, runs: FakeRuns) -> None:
    """A method out of memory, or without an estimate, stands in the table and decides nothing here."""
    runs.records["measured"] = [record("single", "oom_device"), record("ring", peak=1000)]
    runs.records["estimated"] = [record("single", peak=1000)]

    code, table = checked(tmp_path, *only("measured"))

    assert code == 0
    assert "single  1K  oom_device" in table
    assert "%" not in table


@pytest.mark.parametrize(
    ("ran", "stated", "code"),
    [
        ("ok", "ok", 0),
        ("oom_device", "ok", 1),
        ("ok", "oom_device", 0),
        ("oom_device", "oom_device", 0),
        ("oom_device", None, 0),
    ],
)
def test_an_estimate_may_refuse_what_runs_but_not_the_reverse(
    ran: Status, stated: Status | None, code: int, tmp_path: Path, runs: FakeRuns
) -> None:
    """Both answers of each length are in the table, beside a shorter length that fits by both."""
    runs.records["fits"] = [record("ulysses", ran, seq_len=4096), record("ulysses", seq_len=2048)]
    runs.records["would-fit"] = [record("ulysses", seq_len=2048)]
    if stated is not None:
        runs.records["would-fit"].append(record("ulysses", stated, seq_len=4096))

    found, table = checked(tmp_path, *only("fits"))

    assert found == code
    assert "  ulysses  2K  ok  ok  " in table
    assert f"  ulysses  4K  {ran}  {stated or '-'}  " in table


def test_verdicts_stand_with_their_reasons(tmp_path: Path, runs: FakeRuns) -> None:
    """Those that pass on one line; of the others, why; the exit code is that of `cpbench verify`."""
    verdicts: Iterable[tuple[str, Verdict, str | None]] = (
        ("ring", "pass", None),
        ("ulysses", "pass", None),
        ("usp", "fail", "out: error 1.00e-01 above 1.00e-05"),
        ("fpdt", "error", "rank 1: it died"),
        ("torch-ring", "unsupported", "torch-ring: needs a GPU"),
    )
    runs.report = VerifyReport.of(
        "cuda",
        [Verification(method=m, shape=Shape(), verdict=v, reason=reason) for m, v, reason in verdicts],
        gpus=1,
    )
    runs.codes["verify"] = 1

    code, table = checked(tmp_path, *only("verify"))

    assert code == 1
    assert "  pass  ring, ulysses\n" in table
    assert "  fail  usp\n    usp: out: error 1.00e-01 above 1.00e-05" in table
    assert "  error  fpdt\n    fpdt: rank 1: it died" in table
    assert "  unsupported  torch-ring\n    torch-ring: needs a GPU" in table
    assert table.count("not run") == len(STEPS) - 1


def test_every_part_is_in_the_table(tmp_path: Path, runs: FakeRuns) -> None:
    """Kernels, rates, verdicts, what was measured, fits, the sweep, and the ratio of the throughputs."""
    runs.findings = [
        KernelFinding(kernel="cudnn", shape="4/4 heads", passed=True, worst="out 1e-3"),
        KernelFinding(kernel="cudnn", shape="8/2 heads", passed=True, worst="out 2e-3"),
        KernelFinding(kernel="cuda-flash", shape="4/4 heads", passed=True, worst="out 1e-3"),
        KernelFinding(kernel="cuda-flash", shape="8/2 heads", passed=False, worst="dq 9e-1"),
    ]
    runs.probes = [RateProbe(name="matmul", shape="2 x 2", seconds=0.002, modelled_seconds=0.001)]
    runs.records = {
        "measured": [record("single", peak=MIB)],
        "estimated": [record("single", peak=MIB)],
        "fits": [record("ulysses", peak=3 * MIB)],
        "would-fit": [record("ulysses", peak=3 * MIB)],
        "throughput": [
            make_record(make_case(method, mode="emulate", rank=0), compute_seconds=took)
            for method, took in (("upipe", 2.0), ("ulysses", 1.0))
        ],
        "sweep-1K": [EMULATED.model_copy(update={"peak_allocated_bytes": 100, "estimated_peak_bytes": 101})],
    }

    code, table = checked(tmp_path, "--length=1K")

    assert code == 0
    assert "not run" not in table
    assert "  cudnn  pass\n  cuda-flash  FAIL\n    8/2 heads: dq 9e-1\n" in table
    assert "\nrates\n  matmul  2 x 2  2 ms  model / measured 0.50\n" in table
    assert "\nverify, ranks as processes\n  pass  ring\n" in table
    assert "a world of one, measured, tiny, 2 layers\n  single  1K  ok  1.00 MiB  +0.00%" in table
    assert "what fits: ran, and estimated\n  ulysses  1K  ok  ok  3.00 MiB\n" in table
    assert "+1.00%" in table
    assert "  upipe / ulysses = 0.500\n" in table
    assert all(f"{step} " in table.splitlines()[-1] for step in STEPS)
    lines = (tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == sum(map(len, runs.records.values()))


def test_the_make_file_names_steps_that_are_there() -> None:
    """The example beside `make gpu` is taken as it stands."""
    (line,) = (
        line
        for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
        if line.startswith("gpu:")
    )
    example = shlex.split(line.split('ARGS="')[1].split('"')[0])
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--skip", action="append", choices=STEPS)
    assert parser.parse_args(example).skip
