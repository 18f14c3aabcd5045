"""What a sweep shows: live table and summary at several widths, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cpbench.case import Case
from cpbench.expand import Plan, ResolvedCase
from cpbench.launch import Progress
from cpbench.mode import ModeChoice
from cpbench.progress import LiveDisplay, PlainDisplay, make_display
from cpbench.record import Record
from cpbench.scenario import Scenario
from cpbench.summary import CaseNames, print_cases, print_summary
from tests.cpbench.workers.harness import fake_case

FACTS = {
    "machine": None,
    "cpbench_version": "0",
    "git_commit": None,
    "method_source_hash": None,
    "started": "2026-01-01T00:00:00+00:00",
    "duration_seconds": 12.0,
}


def plan_of(number: int) -> Plan:
    cases = tuple(ResolvedCase(case=fake_case("ok", seq_len=1024 * (k + 1))) for k in range(number))
    return Plan(scenario=Scenario(name="fake"), choice=ModeChoice("measure", "cpu", "a test"), cases=cases)


def ok(case: Case) -> Record:
    record = Record.without_result(case, "ok", "", FACTS)
    numbers = {
        "peak_allocated_bytes": 51 * 2**30,
        "step_seconds": 12.3,
        "tokens_per_second_per_gpu": 123456.0,
    }
    return record.model_copy(update=numbers | {"reason": None})


def failed(case: Case, reason: str) -> Record:
    return Record.without_result(case, "error", reason, FACTS)


def terminal(width: int, height: int = 24) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_live_table_fits_the_terminal(width: int) -> None:
    """Status, peak, step, rate, what runs now and the mode are all visible, and no line is too long."""
    plan = plan_of(3)
    console = terminal(width)
    display = LiveDisplay(plan, console)
    display.finished(ok(plan.cases[0].case))
    display.started(plan.cases[1].case)
    display.waiting(plan.cases[1].case, Progress(phase="step", done=2, total=5), 3.0)
    console.print(display._render())
    output = text_of(console)
    for phrase in (
        "51.0 GiB",
        "12.3 s",
        "123,456",
        "running",
        "waiting",
        "step 2/5",
        "1/3 done",
        "mode measure on cpu",
    ):
        assert phrase in output
    assert max(map(len, output.splitlines())) <= width


def test_a_long_sweep_shows_a_window_with_the_running_case() -> None:
    """With more cases than lines, the case that runs is shown and the number of hidden ones is said."""
    plan = plan_of(100)
    console = terminal(80, height=20)
    display = LiveDisplay(plan, console)
    for item in plan.cases[:60]:
        display.finished(ok(item.case))
    display.started(plan.cases[60].case)
    console.print(display._render())
    output = text_of(console)
    assert "61K" in output
    assert "running" in output
    assert "86 more not shown" in output
    assert len(output.splitlines()) < 20


def test_time_left_counts_only_cases_that_ran() -> None:
    """The estimate is the mean of launched cases times those to come; kept ones do not count."""
    plan = plan_of(4)
    display = LiveDisplay(plan, terminal(80))
    display.finished(ok(plan.cases[0].case), kept=True)
    assert display._remaining_seconds() is None
    display.finished(ok(plan.cases[1].case))
    assert display._remaining_seconds() == 24.0


def test_the_display_follows_the_console() -> None:
    """A terminal gets the live table, a pipe gets lines."""
    plan = plan_of(1)
    assert isinstance(make_display(plan, terminal(80)), LiveDisplay)
    assert isinstance(make_display(plan, Console(file=io.StringIO())), PlainDisplay)


def test_plain_lines_survive_brackets_and_width() -> None:
    """A reason with square brackets and more characters than the width stays one whole line."""
    plan = plan_of(1)
    console = Console(file=io.StringIO(), width=80)
    with PlainDisplay(plan, console) as display:
        display.finished(failed(plan.cases[0].case, "[b, s, h] is wrong " + "x" * 100 + "\nsecond line"))
    line = text_of(console).splitlines()[-1]
    assert "[b, s, h] is wrong" in line
    assert "x" * 100 in line
    assert "second line" not in text_of(console)


def test_a_reason_does_not_say_the_method_twice() -> None:
    """Methods begin their reasons with their name, which a line of a case has already."""
    plan = plan_of(1)
    console = terminal(200)
    print_summary([failed(plan.cases[0].case, "single: seq_len=7 is not divisible")], console)
    assert "error: seq_len=7" in text_of(console)


@pytest.mark.parametrize("width", [80, 160])
def test_summary_shows_reasons_at_any_width(width: int) -> None:
    """The table fits, and every reason can be read in full below it."""
    plan = plan_of(2)
    console = terminal(width)
    print_summary(
        [ok(plan.cases[0].case), failed(plan.cases[1].case, "rank 1 fell over\n  last line")], console
    )
    output = text_of(console)
    assert "mode measure on cpu" in output
    assert "rank 1 fell over" in output
    assert "last line" in output
    assert max(map(len, output.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 160])
def test_an_emulation_shows_its_parts(width: int) -> None:
    """Measured compute, modelled communication and the estimate's error; without communication the compute alone."""
    emulated = ok(plan_of(1).cases[0].case).model_copy(
        update={
            "mode": "emulate",
            "step_seconds": None,
            "compute_seconds": 0.085,
            "communication_seconds": None,
            "peak_allocated_bytes": 1000,
            "estimated_peak_bytes": 1003,
        }
    )
    console = terminal(width)
    print_summary([emulated, emulated.model_copy(update={"communication_seconds": 0.012})], console)
    output = text_of(console)
    assert "85 ms compute" in output
    assert "12 ms" in output
    assert "+0.30%" in output
    assert max(map(len, output.splitlines())) <= width


def test_columns_appear_only_where_cases_differ() -> None:
    """Model, stack, dtype and batch take room only if they tell cases apart; options only those that differ."""
    case = fake_case("ok")
    assert CaseNames([case, case]).columns == ("method", "length", "world")
    assert CaseNames([case, case]).options(case) == ""
    other = case.model_copy(update={"dtype": "bfloat16", "options": {"act": "fail", "same": 1}})
    third = other.model_copy(update={"method": "ring"})
    names = CaseNames([case.model_copy(update={"options": {"act": "ok", "same": 1}}), other, third])
    assert names.columns == ("method", "length", "world", "dtype")
    assert names.options(other) == "act=fail"
    assert names.options(third) == ""
    assert names.title(other) == "single  tiny  1K  x2  bfloat16  act=fail"


def varied_plan() -> Plan:
    """Cases that differ in everything, with a long method name and long options."""
    base = fake_case("ok", seq_len=1000001)
    cases = [base.model_copy(update={"method": "torch-ring"})]
    for value in ("device", "host"):
        options = {"keep_output": value, "stage_heads": 8, "published": value == "host", "all_of_them": 1}
        changes = {"method": "upipe", "options": options, "batch_size": 2, "dtype": "bfloat16"}
        cases.append(base.model_copy(update=changes))
    return Plan(
        scenario=Scenario(name="fake"),
        choice=ModeChoice("measure", "cpu", "a test"),
        cases=tuple(ResolvedCase(case=case) for case in cases),
    )


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_no_number_is_cut_where_options_vary(width: int) -> None:
    """Summary and live table show every number, name and differing option whole, in a narrow window too."""
    plan = varied_plan()
    records = [ok(item.case) for item in plan.cases]
    for live in (False, True):
        console = terminal(width)
        if live:
            display = LiveDisplay(plan, console)
            for record in records:
                display.finished(record)
            console.print(display._render())
        else:
            print_summary(records, console)
        output = text_of(console)
        for whole in ("torch-ring", "1000001", "51.0 GiB", "12.3 s", "123,456", "tokens/s", "bfloat16"):
            assert whole in output, (live, whole, output)
        for option in ("keep_output=device", "keep_output=host", "published=false"):
            assert option in output, (live, output)
        assert "stage_heads" not in output
        assert "all_of_them" not in output
        assert "…" not in output
        assert max(map(len, output.splitlines())) <= width


def test_progress_lines_name_what_differs() -> None:
    """Plain and live lines of cases that differ only in an option can be told apart."""
    plan = varied_plan()
    console = Console(file=io.StringIO(), width=80)
    with PlainDisplay(plan, console) as display:
        display.started(plan.cases[2].case)
        display.finished(ok(plan.cases[2].case))
    lines = text_of(console).splitlines()
    assert all("keep_output=host, published=true" in line for line in lines[-2:])
    live = LiveDisplay(plan, terminal(200))
    live.started(plan.cases[1].case)
    assert "keep_output=device" in live._now()[0]


def test_dry_run_lists_ids_and_reasons() -> None:
    """The listing has the id of every case and why some are unsupported."""
    case = fake_case("ok")
    console = Console(file=io.StringIO(), width=120)
    print_cases([ResolvedCase(case=case), ResolvedCase(case=case, unsupported="too many heads")], console)
    output = text_of(console)
    assert case.case_id in output
    assert "act=ok" in output
    assert "unsupported: too many heads" in output
