"""Sweeps of fake cases under a real torchrun: records, interrupts, resuming, locks."""

from __future__ import annotations

import signal
import uuid
from pathlib import Path

import pandas as pd
import psutil
import pytest

from cpbench.record import Record, read_record
from cpbench.run_folder import RunFolder
from tests.cpbench.workers.harness import alive, hanging, start_sweep, wait_until


@pytest.fixture
def token() -> str:
    return uuid.uuid4().hex


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, int, str]:
    """One sweep with a case of every kind, its exit code and what it printed."""
    folder = tmp_path_factory.mktemp("sweep") / "run"
    process = start_sweep(folder, "ok,fail,oom,nan", uuid.uuid4().hex)
    output, _ = process.communicate(timeout=200)
    return RunFolder(folder), process.returncode, output


def by_act(folder: RunFolder) -> dict[str, Record]:
    records, problems = folder.read_all()
    assert problems == []
    return {str(record.options["act"]): record for record in records}


def test_a_failed_case_does_not_stop_the_sweep(finished: tuple[RunFolder, int, str]) -> None:
    """Every case has a record with its own status, and the exit code says that one is incomplete."""
    folder, code, _ = finished
    statuses = {act: record.status for act, record in by_act(folder).items()}
    assert statuses == {"ok": "ok", "fail": "error", "oom": "oom_device", "nan": "invalid"}
    assert code == 3


def test_records_say_where_they_come_from(finished: tuple[RunFolder, int, str]) -> None:
    """A record holds machine, versions, times and the numbers of every rank."""
    record = by_act(finished[0])["ok"]
    assert record.machine is not None
    assert record.cpbench_version
    assert record.started.endswith("+00:00")
    assert record.duration_seconds > 0.5
    assert [rank.memory.peak_allocated_bytes for rank in record.ranks] == [1000, 1001]
    assert record.peak_allocated_bytes == 1001


def test_missing_numbers_are_null(finished: tuple[RunFolder, int, str]) -> None:
    """A case without a result has no numbers at all, and a reason."""
    record = by_act(finished[0])["fail"]
    assert record.step_seconds is None
    assert record.peak_allocated_bytes is None
    assert record.reason == "rank 1: the flux capacitor is empty"


def test_tables_are_derived(finished: tuple[RunFolder, int, str]) -> None:
    """records.parquet and records.csv have one row a case."""
    folder = finished[0].path
    parquet, csv = pd.read_parquet(folder / "records.parquet"), pd.read_csv(folder / "records.csv")
    assert (len(parquet), len(csv)) == (4, 4)
    assert set(parquet["status"]) == {"ok", "error", "oom_device", "invalid"}


def test_run_json_tells_the_whole_story(finished: tuple[RunFolder, int, str]) -> None:
    """run.json has command, scenario, machine, versions, start, end and the cases in order."""
    info = finished[0].read_info()
    assert info.command == ("cpbench", "sweep", "--fake")
    assert len(info.case_ids) == 4
    assert info.end is not None
    assert info.sessions[-1].exit_code == 3
    assert "torch" in info.versions


def test_a_pipe_gets_plain_lines(finished: tuple[RunFolder, int, str]) -> None:
    """Without a terminal there is one line when a case starts and one when it ends, and the mode."""
    output = finished[2]
    assert "mode measure on cpu" in output
    assert output.count("started\n") == 4
    assert "[2/4] single  tiny  1025  x2  act=fail  error  rank 1: the flux capacitor is empty" in output
    assert "\x1b" not in output


def test_only_results_remain(finished: tuple[RunFolder, int, str]) -> None:
    """The scratch folder is gone; every case has logs."""
    folder = finished[0].path
    assert not (folder / "scratch").exists()
    assert len(list(folder.glob("logs/*/launcher.log"))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupt_then_resume(tmp_path: Path, token: str, number: signal.Signals) -> None:
    """An interrupted sweep leaves no process and its finished records; --resume runs only what is missing."""
    folder = tmp_path / "run"
    process = start_sweep(folder, "ok,hang", token)
    wait_until(lambda: hanging(folder), seconds=120, what="the second case")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert 128 + number == process.returncode
    assert alive(token) == []
    (done,) = folder.glob("cases/*.json")
    before = done.read_bytes()
    assert len(pd.read_parquet(folder / "records.parquet")) == 1
    assert RunFolder(folder).read_info().end is not None

    # The hanging case would hang again, so the resumed sweep is asked for the first case alone.
    resumed = start_sweep(folder, "ok", token, "--resume")
    output, _ = resumed.communicate(timeout=60)
    assert resumed.returncode == 0
    assert "(kept)" in output
    assert "started" not in output
    assert before == done.read_bytes()


@pytest.mark.slow
def test_killing_the_sweep_leaves_no_process(tmp_path: Path, token: str) -> None:
    """SIGKILL of the sweep ends torchrun and all ranks; --resume completes without repeating a case."""
    folder = tmp_path / "run"
    process = start_sweep(folder, "ok,hang", token)
    wait_until(lambda: hanging(folder), seconds=120, what="the second case")
    assert len(alive(token)) >= 5  # the sweep, its supervisor, torchrun, two ranks
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: alive(token) == [], seconds=60, what="the end of all processes")
    (done,) = folder.glob("cases/*.json")
    before = done.stat().st_mtime_ns
    relax(folder)

    resumed = start_sweep(folder, "ok,hang", token, "--resume")
    output, _ = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, output
    assert output.count("started") == 1
    assert before == done.stat().st_mtime_ns
    assert [read_record(file).status for file in folder.glob("cases/*.json")] == ["ok", "ok"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ending_a_sweep_of_estimates_leaves_no_process(
    tmp_path: Path, token: str, number: signal.Signals
) -> None:
    """SIGKILL and SIGINT end the estimates under way; --resume completes without repeating a finished case."""
    folder = tmp_path / "run"
    process = start_sweep(folder, "ok,hang,hang", token, "--estimate")
    wait_until(lambda: hanging(folder), seconds=120, what="the second and third case")
    assert len(alive(token)) >= 5  # the sweep, its supervisor, the server, two estimates
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (128 + number if number == signal.SIGINT else -number), output
    wait_until(lambda: alive(token) == [], seconds=60, what="the end of all processes")
    (done,) = folder.glob("cases/*.json")
    before = done.stat().st_mtime_ns
    relax(folder)

    resumed = start_sweep(folder, "ok,hang,hang", token, "--resume", "--estimate")
    output, _ = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, output
    assert output.count("started\n") == 2
    assert output.count("(kept)") == 1
    assert before == done.stat().st_mtime_ns
    assert [read_record(file).status for file in folder.glob("cases/*.json")] == ["ok"] * 3
    assert alive(token) == []


def relax(folder: Path) -> None:
    """From now on the fake worker's hanging case ends well."""
    (folder / "relaxed").touch()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["supervisor", "worker"])
def test_killing_a_part_of_a_case_leaves_no_process(tmp_path: Path, token: str, victim: str) -> None:
    """When a rank or the supervisor is killed, its case fails and the sweep goes on; --resume repeats it alone."""
    folder = tmp_path / "run"
    process = start_sweep(folder, "hang,ok", token)
    wait_until(lambda: hanging(folder), seconds=120, what="the first case")
    supervisor = psutil.Process(process.pid).children()[0]
    if victim == "supervisor":
        supervisor.kill()
    else:
        ranks = [p for p in supervisor.children(recursive=True) if p.environ().get("RANK") == "1"]
        ranks[0].kill()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 3, output
    wait_until(lambda: alive(token) == [], seconds=60, what="the end of all processes")
    found = {record.status: record for record in by_act(RunFolder(folder)).values()}
    assert set(found) == {"error", "ok"}
    if victim == "worker":
        assert "rank 1 was killed by signal 9 (SIGKILL)" in str(found["error"].reason)
    finished = folder / "cases" / f"{found['ok'].case_id}.json"
    before = finished.stat().st_mtime_ns
    relax(folder)

    resumed = start_sweep(folder, "hang,ok", token, "--resume")
    output, _ = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, output
    assert (output.count("started"), output.count("(kept)")) == (1, 1)
    assert before == finished.stat().st_mtime_ns
    assert {record.status for record in by_act(RunFolder(folder)).values()} == {"ok"}
    assert alive(token) == []


@pytest.mark.slow
def test_a_second_sweep_on_the_same_folder_is_refused(tmp_path: Path, token: str) -> None:
    """While a sweep writes to a folder, another one is refused with a sentence, with and without --resume."""
    folder = tmp_path / "run"
    process = start_sweep(folder, "hang", token)
    wait_until(lambda: hanging(folder), seconds=120, what="the case")
    for rest in ((), ("--resume",)):
        second = start_sweep(folder, "ok", token, *rest)
        output, _ = second.communicate(timeout=60)
        assert second.returncode != 0
        assert "another sweep is writing to" in output
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert alive(token) == []
