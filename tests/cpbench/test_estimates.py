"""Real estimates through the pool: what they give, what they say when they fail, and searches over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cpbench.case import Case
from cpbench.estimate_pool import EstimatePool
from cpbench.estimates import Estimate, PooledEstimates, Search, answered
from cpbench.launch import Job, launch
from cpbench.model_config import load_model
from cpbench.rank_report import CaseReport
from cpbench.record import Record

NAME, TINY = load_model("tiny")
PLUGIN = Path(__file__).parent / "workers" / "deadly.py"
CASE = Case(
    method="ulysses", model=NAME, architecture=TINY, seq_len=4096, world_size=2, device="cuda", hardware="h100-80g",
    mode="estimate",
)  # fmt: skip


@pytest.fixture(scope="module")
def estimates() -> Iterator[PooledEstimates]:
    """One at a time, so that cases share a process."""
    with PooledEstimates([PLUGIN], pool=EstimatePool(1)) as entered:
        yield entered


def asked(cases: list[Case]) -> Search[list[Estimate]]:
    """A search that asks for cases in turn."""
    found = []
    for case in cases:
        found.append((yield case))
    return found


def numbers(record: Record | None) -> dict[str, object]:
    """All of a record but when it was made and how long that took."""
    assert record is not None
    return record.model_dump(exclude={"started", "duration_seconds"})


def test_an_estimate_is_that_of_a_process_of_its_own(tmp_path: Path, estimates: PooledEstimates) -> None:
    """The first of a child, and a later one after others: the same numbers, which another length does not have."""
    longer = CASE.model_copy(update={"seq_len": 8192})
    ((_, (first, other, again)),) = answered([asked([CASE, longer, CASE])], estimates)

    job = Job(
        case=CASE,
        scratch=tmp_path / "scratch",
        log_dir=tmp_path / "logs",
        timeout_seconds=200.0,
        worker=("-m", "cpbench.plan_worker"),
    )
    assert launch(job, should_stop=lambda: False).code == 0
    alone = CaseReport.model_validate_json((job.folder / "report.json").read_text(encoding="utf-8"))
    assert alone.report is not None
    facts = {"machine": None, "cpbench_version": "", "git_commit": None, "method_source_hash": None}
    expected = Record.from_ranks(alone.case, alone.report, facts | {"started": "", "duration_seconds": 0.0})

    mine = numbers(expected) | {"cpbench_version": numbers(first.record)["cpbench_version"]}
    assert numbers(first.record) == mine
    assert numbers(again.record) == mine
    assert numbers(other.record) != mine


def test_failures_are_told_apart(estimates: PooledEstimates) -> None:
    """A case that cannot run, a method that ends its process, a wrong option; the next case is estimated."""
    refused = CASE.model_copy(update={"world_size": 3})
    deadly = CASE.model_copy(update={"method": "deadly"})
    wrong = CASE.model_copy(update={"options": {"colour": "blue"}})
    ((_, found),) = answered([asked([refused, deadly, wrong, CASE])], estimates)

    assert [estimate.failed for estimate in found] == [False, True, True, False]
    assert "not divisible" in (found[0].reason or "")
    assert (found[1].reason or "").startswith("the worker ended with code 3")
    assert "deadly was here" in (found[1].reason or "")
    assert "colour" in (found[2].reason or "")
    assert found[3].record is not None
    assert found[3].record.peak_allocated_bytes


class Echo:
    """Two at a time; says of each case only which it was, those begun later first."""

    def __init__(self) -> None:
        self.running: dict[int, Case] = {}
        self.most = 0
        self._count = 0

    @property
    def free(self) -> int:
        return 2 - len(self.running)

    def start(self, case: Case) -> int:
        self._count += 1
        self.running[self._count] = case
        self.most = max(self.most, len(self.running))
        return self._count

    def wait(self) -> list[tuple[int, Estimate]]:
        number, case = self.running.popitem()
        return [(number, Estimate(case=case))]


def test_searches_get_the_answers_to_their_own_questions() -> None:
    """As many at a time as there is room for; each is told where it stood, also one that asks nothing."""
    lengths = [[1, 2, 3], [], [4], [5, 6]]
    echo = Echo()
    searches = [asked([CASE.model_copy(update={"seq_len": n}) for n in wanted]) for wanted in lengths]

    found = dict(answered(searches, echo))

    assert {place: [e.case.seq_len for e in each] for place, each in found.items()} == dict(
        enumerate(lengths)
    )
    assert echo.most == 2
    assert not echo.running
