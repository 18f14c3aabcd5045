"""Estimates in forks of one process: every way a case or the server may end, and no process left behind.

The cases are fake and the server loads no torch; that real estimates come out the same is in test_estimates.py.
"""

from __future__ import annotations

import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cpbench import estimate_pool
from cpbench.estimate_pool import EstimatePool
from cpbench.launch import Exit, Job
from cpbench.outcome import Outcome, explain
from tests.cpbench.workers.harness import (
    COLD_SERVER,
    TOKEN,
    alive,
    cold_pool,
    fake_estimate,
    hanging,
    wait_until,
)

SECONDS = 120.0


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    value = uuid.uuid4().hex
    monkeypatch.setenv(TOKEN, value)
    return value


@pytest.fixture
def pool(token: str) -> Iterator[EstimatePool]:
    """Room for three; whatever a test did, nothing is left afterwards."""
    with cold_pool(3) as entered:
        yield entered
    assert alive(token) == []


def outcomes(pool: EstimatePool, jobs: list[Job]) -> dict[str, Outcome]:
    """What comes of jobs, by act, as many at a time as there is room for."""
    waiting, found = list(jobs), dict[str, Outcome]()
    deadline = time.monotonic() + SECONDS
    while len(found) < len(jobs):
        assert time.monotonic() < deadline
        while waiting and pool.free:
            pool.start(waiting.pop(0))
        for job, exit in pool.wait(0.1):
            found[str(job.case.options["act"])] = explain(job, exit, oom_kills=0)
    return found


def next_ended(pool: EstimatePool) -> list[tuple[Job, Exit]]:
    """What ends next, all at once."""
    ended: list[tuple[Job, Exit]] = []
    wait_until(lambda: bool(ended.extend(pool.wait(0.1)) or ended), seconds=SECONDS, what="the end of a case")
    return ended


def pass_time(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the pool believe that so much time has passed."""
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + seconds)
    monkeypatch.setattr(estimate_pool, "time", clock)


def process_of(outcome: Outcome) -> str | None:
    """The process that a fake estimate says it ran in."""
    assert outcome.report is not None, outcome.reason
    return outcome.report.gpu


def server() -> psutil.Process:
    """The one that forks; its children run the same command."""
    (found,) = (
        process
        for process in psutil.Process().children(recursive=True)
        if "cpbench.supervise" in process.parent().cmdline()  # type: ignore[union-attr]  # of a descendant
        and COLD_SERVER[1] in process.cmdline()
        and "cpbench.supervise" not in process.cmdline()
    )
    return found


def test_a_case_that_fails_fails_alone(tmp_path: Path, pool: EstimatePool) -> None:
    """One raises, one aborts, one is killed, one reports its failure, one says nothing; each is told in words."""
    acts = ("crash", "ok", "abort", "kill", "oom", "silent")
    found = outcomes(pool, [fake_estimate(tmp_path, act) for act in acts])

    assert found["ok"].status == "ok"
    assert found["oom"].status == "oom_device"
    assert str(found["oom"].reason).startswith("rank 0: 3.0 GiB more were asked for")
    said = {act: str(outcome.reason) for act, outcome in found.items() if outcome.status == "error"}
    assert set(said) == {"crash", "abort", "kill", "silent"}
    assert said["crash"].startswith("the worker ended with code 1")
    assert "RuntimeError: nobody wrote a failure file" in said["crash"]
    assert said["abort"].startswith("rank 0 was killed by signal 6 (SIGABRT)")
    assert said["kill"].startswith("rank 0 was killed by signal 9 (SIGKILL)")
    assert said["silent"].startswith("the worker ended without error but its report is missing")


def test_a_child_takes_one_case_after_another(tmp_path: Path, pool: EstimatePool) -> None:
    """Until one fails, or it has run as many as it may, here two: the next case has a new process."""

    def ran(name: str, act: str = "ok") -> Outcome:
        return outcomes(pool, [fake_estimate(tmp_path / name, act)])[act]

    first, second, third = (process_of(ran(name)) for name in "abc")
    failed = ran("d", "crash")
    fourth = process_of(ran("e"))

    assert first == second
    assert failed.status == "error"
    assert len({first, third, fourth}) == 3


def test_a_case_over_its_time_is_ended(
    tmp_path: Path, pool: EstimatePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one that ignores SIGTERM; its server goes on."""
    pool.start(fake_estimate(tmp_path, "stubborn", timeout_seconds=1000.0))
    wait_until(lambda: hanging(tmp_path, 1), seconds=SECONDS, what="the case")
    assert pool.wait(0.1) == []
    before = server()
    pass_time(monkeypatch, 1001.0)
    ((job, exit),) = next_ended(pool)

    outcome = explain(job, exit, oom_kills=0)
    assert outcome.status == "timeout"
    assert str(outcome.reason).startswith("no result after 16 min 40 s, in step 2/5")
    assert outcomes(pool, [fake_estimate(tmp_path, "ok")])["ok"].status == "ok"
    assert server() == before


def test_a_killed_server_is_said_and_replaced(tmp_path: Path, pool: EstimatePool, token: str) -> None:
    """SIGKILL of the server in the middle: what ran is an error in words, and the next case gets a new server."""
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        pool.start(fake_estimate(folder, "hang"))
    wait_until(lambda: all(hanging(folder, 1) for folder in folders), seconds=SECONDS, what="both cases")
    server().kill()
    ended = next_ended(pool)

    assert len(ended) == 2
    for job, exit in ended:
        outcome = explain(job, exit, oom_kills=0)
        assert outcome.status == "error"
        assert str(outcome.reason).startswith("rank 0 was killed by signal 9 (SIGKILL)")
        log = job.launcher_log.read_text(encoding="utf-8")
        assert "the process that this estimate was forked from ended with code 137" in log
        # The kernel's out-of-memory killer strikes the same way.
        assert explain(job, exit, oom_kills=1).status == "oom_host"
    assert alive(token) == []
    assert outcomes(pool, [fake_estimate(tmp_path, "ok")])["ok"].status == "ok"


def test_a_server_that_does_not_answer_is_replaced(
    tmp_path: Path, pool: EstimatePool, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped server cannot end a case that is long over its time; the pool ends both."""
    pool.start(fake_estimate(tmp_path, "hang", timeout_seconds=1000.0))
    wait_until(lambda: hanging(tmp_path, 1), seconds=SECONDS, what="the case")
    server().send_signal(signal.SIGSTOP)
    pass_time(monkeypatch, 2000.0)
    ((job, exit),) = next_ended(pool)

    assert explain(job, exit, oom_kills=0).status == "timeout"
    assert alive(token) == []
    assert outcomes(pool, [fake_estimate(tmp_path, "ok")])["ok"].status == "ok"


def test_leaving_the_pool_ends_what_runs(tmp_path: Path, token: str) -> None:
    """An exception inside is as good; processes that ignore SIGTERM, and their orphans, are ended too."""

    def interrupted() -> None:
        with cold_pool() as pool:
            pool.start(fake_estimate(tmp_path, "stubborn"))
            pool.start(fake_estimate(tmp_path, "hang"))
            wait_until(lambda: hanging(tmp_path), seconds=SECONDS, what="both cases")
            assert (
                len(alive(token)) >= 5
            )  # supervisor, server, two children, an orphan in a session of its own
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert alive(token) == []
