"""Launching: files over the border, outcomes told apart, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from cpbench.launch import (
    ONE_NODE,
    Exit,
    Job,
    Nodes,
    child_environment,
    job_command,
    launch,
    read_progress,
    torchrun_command,
)
from cpbench.outcome import Outcome, explain
from cpbench.record import RankFailure, Status
from tests.cpbench.workers.harness import TOKEN, alive, fake_case, fake_job, hanging

SUMMARY = """E1123 08:32:23 5313 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9)
W1123 08:32:23 5313 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 18 closing signal
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 18)  (SIGTERM)
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 19)  (SIGKILL)
"""


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    value = uuid.uuid4().hex
    monkeypatch.setenv(TOKEN, value)
    return value


def run(job: Job, oom_kills: int = 0) -> Outcome:
    return explain(job, launch(job, should_stop=lambda: False), oom_kills=oom_kills)


def ended(job: Job, *, code: int = 1, timed_out: bool = False, oom_kills: int = 0) -> Outcome:
    """The outcome of a launch that is over, from the files a test has put there."""
    exit = Exit(code=code, timed_out=timed_out, interrupted=False, duration_seconds=1.0)
    return explain(job, exit, oom_kills=oom_kills)


def prepare(job: Job, *failures: RankFailure, launcher: str = "", rank_log: str = "") -> None:
    job.folder.mkdir(parents=True)
    job.log_dir.mkdir(parents=True)
    job.launcher_log.write_text(launcher, encoding="utf-8")
    (job.log_dir / "rank1.log").write_text(rank_log, encoding="utf-8")
    for failure in failures:
        (job.folder / f"failure-rank{failure.rank}.json").write_text(
            failure.model_dump_json(), encoding="utf-8"
        )


def failure(rank: int, status: Status, reason: str, time: float) -> RankFailure:
    return RankFailure(rank=rank, status=status, reason=reason, time=time)


def test_success_gives_every_ranks_report(
    tmp_path: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks run under torchrun, the report comes back, nothing stays alive or in the folder of temporary files."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    job = fake_job(tmp_path, "ok")
    outcome = run(job)
    assert list(temporary.iterdir()) == []
    assert outcome.status == "ok", outcome.reason
    assert outcome.report is not None
    assert [rank.rank for rank in outcome.report.ranks] == [0, 1]
    assert alive(token) == []


def test_job_file_carries_the_case_and_absolute_folders(tmp_path: Path) -> None:
    """The measured half gets the case, the plug-ins, its scratch folder and its log folder."""
    job = fake_job(tmp_path, "ok")
    launch(job, should_stop=lambda: True)
    body = json.loads((job.folder / "job.json").read_text(encoding="utf-8"))
    assert job.case.model_dump(mode="json") == body["case"]
    assert {"case", "plugins", "scratch", "log_dir"} == set(body)
    assert Path(body["scratch"]).is_absolute()


@pytest.mark.slow
def test_interrupt_ends_even_those_who_ignore_sigterm(tmp_path: Path, token: str) -> None:
    """Ranks that ignore SIGTERM and orphaned grandchildren in their own sessions are gone after an interrupt."""
    job = fake_job(tmp_path, "stubborn")
    seen: list[int] = []

    def ready() -> bool:
        seen.append(len(alive(token)))
        return hanging(tmp_path)

    exit = launch(job, should_stop=ready)
    assert exit.interrupted
    assert not exit.timed_out
    assert max(seen) >= 6  # supervisor, torchrun, two ranks, two grandchildren
    assert alive(token) == []
    progress = read_progress(job)
    assert progress is not None
    assert (progress.phase, progress.done, progress.total) == ("step", 2, 5)


def test_timeout_ends_the_tree(tmp_path: Path, token: str) -> None:
    """A case that takes longer than it may is ended with everything it started, and is a timeout."""
    outcome = run(fake_job(tmp_path, "hang", timeout_seconds=2))
    assert outcome.status == "timeout"
    assert "no result after 2 s" in str(outcome.reason)
    assert alive(token) == []


def test_timeout_says_how_far_it_got(tmp_path: Path) -> None:
    """The reason of a timeout has the last phase and the last lines of a log."""
    job = fake_job(tmp_path, "ok", timeout_seconds=90)
    prepare(job, rank_log="stuck in a collective\n")
    (job.folder / "progress.json").write_text('{"phase": "step", "done": 2, "total": 5}', encoding="utf-8")
    reason = str(ended(job, code=143, timed_out=True).reason)
    # Twice 90 s x 5/2, 15 minutes to start, in whole 10 minutes.
    assert (
        "no result after 90 s, in step 2/5; allow more with --timeout, at this pace about --timeout 1800\n"
        in reason
    )
    assert "stuck in a collective" in reason


def test_killed_rank_is_an_error_with_its_signal(tmp_path: Path, token: str) -> None:
    """A rank ended by SIGKILL without memory pressure is an error that names rank and signal."""
    outcome = run(fake_job(tmp_path, "kill"))
    assert outcome.status == "error"
    assert outcome.reason == "rank 1 was killed by signal 9 (SIGKILL)"
    assert alive(token) == []


def test_crash_in_native_code_says_where(tmp_path: Path) -> None:
    """Of what faulthandler writes, the reason keeps the kind of crash and the innermost calls."""
    program = "import ctypes\ndef broken_kernel():\n    ctypes.string_at(0)\nbroken_kernel()\n"
    crashed = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program], capture_output=True, text=True, check=False
    )
    job = fake_job(tmp_path, "ok")
    prepare(job, rank_log=f"before\n{crashed.stderr}Extension modules: one, two\n")
    reason = str(ended(job).reason)
    assert "Fatal Python error: Segmentation fault" in reason
    assert "in broken_kernel" in reason
    assert "Extension modules" not in reason
    assert "before" not in reason


def test_crash_shows_the_last_line_and_no_frames(tmp_path: Path) -> None:
    """A rank that raises without a failure file is named, with its message but not its traceback."""
    outcome = run(fake_job(tmp_path, "crash"))
    assert outcome.status == "error"
    assert outcome.reason is not None
    assert outcome.reason.startswith("rank 1 ended with code 1")
    assert "RuntimeError: nobody wrote a failure file" in outcome.reason
    assert "Traceback" not in outcome.reason
    assert 'File "' not in outcome.reason


def test_earliest_failure_is_the_cause(tmp_path: Path) -> None:
    """Of several failing ranks, the one that failed first gives status and reason."""
    job = fake_job(tmp_path, "ok")
    prepare(job, failure(0, "error", "lost its peer", 2.0), failure(1, "error", "first", 1.0))
    outcome = ended(job)
    assert (outcome.status, outcome.reason) == ("error", "rank 1: first")


def test_a_known_cause_beats_a_lost_peer(tmp_path: Path) -> None:
    """Out of memory on one rank is the cause even if another rank's broken connection was written earlier."""
    job = fake_job(tmp_path, "ok")
    prepare(job, failure(0, "error", "connection closed", 1.0), failure(1, "oom_device", "3 GiB more", 1.1))
    assert ended(job).status == "oom_device"


@pytest.mark.parametrize(("kills", "status"), [(0, "error"), (1, "oom_host")])
def test_sigkill_is_host_oom_only_if_the_kernel_says_so(tmp_path: Path, kills: int, status: str) -> None:
    """SIGKILL becomes oom_host when the kernel's out-of-memory counter rose meanwhile."""
    job = fake_job(tmp_path, "ok")
    prepare(job, failure(0, "error", "connection closed", 1.0), launcher=SUMMARY.format(code=-9))
    outcome = ended(job, oom_kills=kills)
    assert outcome.status == status
    assert outcome.reason is not None
    assert outcome.reason.startswith("rank 1 was killed")


def test_ranks_ended_by_torchrun_are_not_the_cause(tmp_path: Path) -> None:
    """The rank that torchrun terminated because of another one's failure is not blamed."""
    job = fake_job(tmp_path, "ok")
    prepare(job, launcher=SUMMARY.format(code=3))
    outcome = ended(job)
    assert outcome.reason == "rank 1 ended with code 3"


def test_a_missing_or_garbled_report_is_an_error(tmp_path: Path) -> None:
    """Exit code 0 without a whole report is an error that says so, never an ok record."""
    job = fake_job(tmp_path, "ok")
    prepare(job)
    missing = ended(job, code=0)
    (job.folder / "report.json").write_text('{"ranks": [', encoding="utf-8")
    garbled = ended(job, code=0)
    assert (missing.status, garbled.status) == ("error", "error")
    assert "is missing" in str(missing.reason)
    assert "cannot be read" in str(garbled.reason)


def test_log_tail_is_short(tmp_path: Path) -> None:
    """A reason holds a few lines of the log, each of bounded length and without colour codes."""
    job = fake_job(tmp_path, "ok")
    text = "\n".join(f"\x1b[31mline {k}\x1b[0m {'x' * 1000}" for k in range(100))
    prepare(job, failure(1, "error", "broken", 1.0), rank_log=text)
    reason = str(ended(job).reason)
    assert len(reason.splitlines()) == 8
    assert "\x1b" not in reason
    assert max(map(len, reason.splitlines())) < 300


def test_one_node_uses_a_port_of_its_own() -> None:
    """A case on one machine never shares a port: torchrun's standalone rendezvous picks a free one."""
    job = Job(case=fake_case("ok"), scratch=Path("s"), log_dir=Path("l"), timeout_seconds=1.0)
    command = torchrun_command(job)
    assert "--standalone" in command
    assert command[-4:] == ["--max-restarts", "0", "-m", "cpbench.worker"]
    assert job.nodes is ONE_NODE


def test_nodes_and_endpoint_pass_through() -> None:
    """With several machines, node count, rank and endpoint reach torchrun, and each node starts its share."""
    nodes = Nodes(count=2, rank=1, endpoint="host0:29400")
    case = fake_case("ok", world_size=8)
    job = Job(
        case=case, scratch=Path("runs/r/scratch/c"), log_dir=Path("l"), timeout_seconds=1.0, nodes=nodes
    )
    command = " ".join(torchrun_command(job))
    assert "--nproc-per-node 4 --nnodes 2 --node-rank 1" in command
    assert "--rdzv-endpoint host0:29400 --rdzv-id r-" in command
    assert job.launcher_log.name == "launcher-node1.log"


def estimate_job(folder: Path, act: str) -> Job:
    job = fake_job(folder, act)
    case = job.case.model_copy(update={"mode": "estimate"})
    return replace(job, case=case)


def test_an_estimate_is_a_plain_process(tmp_path: Path, token: str) -> None:
    """Without torchrun the report comes back the same way and nothing stays alive."""
    job = estimate_job(tmp_path, "ok")

    assert "torch.distributed.run" not in job_command(job)
    outcome = run(job)
    assert outcome.status == "ok"
    assert outcome.report is not None
    assert [rank.rank for rank in outcome.report.ranks] == [0]
    assert alive(token) == []


@pytest.mark.parametrize(("kills", "status"), [(0, "error"), (1, "oom_host")])
def test_a_signal_ends_an_estimate_as_it_ends_a_rank(tmp_path: Path, kills: int, status: str) -> None:
    """The one process is rank 0: a SIGKILL by the kernel's out-of-memory killer is out of host memory."""
    job = estimate_job(tmp_path, "ok")
    prepare(job)
    outcome = ended(job, code=128 + 9, oom_kills=kills)

    assert outcome.status == status
    assert str(outcome.reason).startswith("rank 0 was killed")


def test_an_estimate_that_hangs_times_out_with_all_its_processes(tmp_path: Path, token: str) -> None:
    """Time-out and clean-up do not depend on torchrun."""
    outcome = run(replace(estimate_job(tmp_path, "stubborn"), timeout_seconds=2.0))

    assert outcome.status == "timeout"
    assert alive(token) == []


@pytest.mark.parametrize("mode", ["emulate", "estimate"])
def test_one_process_where_ranks_are_not_real(mode: str) -> None:
    """An emulated or estimated case is one process, however large its world."""
    case = fake_case("ok", world_size=8).model_copy(update={"mode": mode})
    job = Job(case=case, scratch=Path("s"), log_dir=Path("l"), timeout_seconds=1.0)
    assert job.local_world_size == 1


def test_threads_share_the_cores_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks split the cores; OMP_NUM_THREADS of the user wins; the caller's folder never shadows packages."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert child_environment(4, single_node=True)["OMP_NUM_THREADS"] == "2"
    assert child_environment(16, single_node=True)["OMP_NUM_THREADS"] == "1"
    assert child_environment(4, single_node=True)["PYTHONSAFEPATH"] == "1"
    assert "OMP_NUM_THREADS" not in child_environment(None, single_node=True)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert child_environment(4, single_node=True)["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("theirs", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_are_expandable_unless_the_user_says_otherwise(
    theirs: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings of the user, under either name, are the only ones."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if theirs:
        monkeypatch.setenv(theirs, "max_split_size_mb:64")
    found = {k: v for k, v in child_environment(4, single_node=True).items() if "ALLOC_CONF" in k}
    wanted = (
        {theirs: "max_split_size_mb:64"} if theirs else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    )
    assert found == wanted


def test_a_rank_that_is_ended_says_where_it_was(tmp_path: Path) -> None:
    """SIGTERM, as after a time-out, leaves the calls in the log, and the reason has the innermost ones."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom cpbench.worker import run_rank\n"
        "def collective_that_hangs():\n    print('waiting', file=sys.stderr, flush=True)\n    time.sleep(60)\n"
        f"run_rank(Path({str(tmp_path)!r}), Path({str(tmp_path)!r}), collective_that_hangs)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"RANK": "1"})
    log = tmp_path / "rank1.log"
    while not (log.is_file() and "waiting" in log.read_text(encoding="utf-8")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == -signal.SIGTERM
    job = fake_job(tmp_path / "job", "ok", timeout_seconds=2)
    prepare(job, rank_log=log.read_text(encoding="utf-8"))
    reason = str(ended(job, code=143, timed_out=True).reason)
    assert "in collective_that_hangs" in reason
    assert "waiting" not in reason


def test_a_finished_rank_leaves_without_finalisation(tmp_path: Path) -> None:
    """Threads of native libraries may abort a process that finalises: a finished rank does not."""
    script = "import atexit, os\nfrom cpbench.worker import leave\natexit.register(os.abort)\nprint('told')\n"
    left, finalised = (
        subprocess.run(
            [sys.executable, "-c", script + end], capture_output=True, text=True, timeout=60, check=False
        )
        for end in ("leave(3)", "raise SystemExit(3)")
    )
    assert (left.returncode, left.stdout) == (3, "told\n")
    assert finalised.returncode == -signal.SIGABRT
