"""`cpbench plan`: the search over made-up estimates, what it recommends, and the command it gives."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cpbench.case import STACKS, Case, Stack
from cpbench.cli import app, flags
from cpbench.cli.plan import _nothing, _print, _then, _uncertainty
from cpbench.context_plan import ContextPlan, MethodPlan, Question
from cpbench.errors import UsageError
from cpbench.estimates import Estimate
from cpbench.hardware import HOST_MARGIN, HOST_PROCESS_BYTES, fit, load_hardware
from cpbench.model_config import load_model
from cpbench.plan import STEP, plan_context
from cpbench.planned_run import duration_words, scenario_text, sweep_command, torchrun_line
from cpbench.record import Record
from cpbench.report.plan_picture import write_plan_picture
from cpbench.scenario import parse_scenario
from cpbench.units import GIB, MIB, format_bytes
from tests.cpbench.workers.harness import ROOT, TOKEN, alive, wait_until

H100 = load_hardware("h100-80g")
NAME, LLAMA = load_model("llama3-8b")


class MadeUp:
    """Estimates by formula, two at a time: bytes and seconds of a token of each method."""

    def __init__(self, **tokens: tuple[float, float, float]) -> None:
        self.tokens = tokens
        self.asked: list[Case] = []
        self._running: list[tuple[int, Case]] = []

    @property
    def free(self) -> int:
        return 2 - len(self._running)

    def start(self, case: Case) -> int:
        assert self.free
        self.asked.append(case)
        self._running.append((len(self.asked), case))
        return len(self.asked)

    def wait(self) -> list[tuple[int, Estimate]]:
        """The one started last, so that answers come in another order than questions."""
        number, case = self._running.pop()
        return [(number, self.estimate(case))]

    def estimate(self, case: Case) -> Estimate:
        """Return a record with the needs of a case; a method without numbers cannot run."""
        if case.method not in self.tokens:
            return Estimate(case=case, reason=f"{case.method} needs a miracle")
        if case.options:
            return Estimate(case=case, reason="no options here")
        device, host, seconds = self.tokens[case.method]
        fixed = 8 * GIB if case.stack.optimizer_offload else 16 * GIB
        if case.stack.save_attention:
            host, seconds = 2 * host, seconds * 0.8
        tokens = case.seq_len / case.world_size * 8
        needs = fit(
            case, H100, peak_bytes=round(fixed + device * tokens), host_bytes=round(host * tokens / 8)
        )
        record = Record.without_result(case, "ok", "", FACTS).model_copy(
            update={
                **needs.model_dump(),
                "step_seconds": seconds * tokens,
                "tokens_per_second_per_gpu": 1 / seconds / 8,
            }
        )
        return Estimate(case=case, record=record)


FACTS = {
    "machine": None,
    "cpbench_version": "0",
    "git_commit": None,
    "method_source_hash": None,
    "started": "",
    "duration_seconds": 0.0,
}


def planned(
    estimates: MadeUp,
    *,
    worlds: tuple[int, ...] = (8,),
    seq_len: int | None = None,
    methods: str = "",
    host: int = 2**41,
) -> ContextPlan:
    question = Question(
        methods=tuple((methods or " ".join(estimates.tokens)).split()),
        model=NAME,
        architecture=LLAMA,
        worlds=worlds,
        hardware="h100-80g",
        host_memory_bytes=host,
        seq_len=seq_len,
    )
    found = plan_context(question, H100, estimates)
    assert {case.host_memory_bytes for case in estimates.asked} == {host}
    return found


def only(found: ContextPlan) -> MethodPlan:
    (plan,) = found.methods
    return plan


def test_device_memory_ends_it_and_the_optimizer_makes_room() -> None:
    """The neighbour was estimated and does not fit; without the optimizer's states it goes further, and says so."""
    estimates = MadeUp(ulysses=(12_000, 1000, 1e-4))
    plan = only(planned(estimates))

    assert plan.ended_by == "device memory"
    assert plan.configuration.stack == {"optimizer_offload": True}
    assert plan.longest is not None
    assert plan.too_long is not None
    assert plan.too_long.seq_len == plan.longest.seq_len + STEP
    assert plan.longest.status == "ok"
    assert "short by" in (plan.reason or "")
    room = H100.usable_memory_bytes - H100.context_bytes - H100.communicator_bytes
    room -= H100.allocator.unused_bytes(layers=32)
    assert plan.longest.seq_len == int((room / 1.03 - 8 * GIB) / 12_000) // STEP * STEP
    assert len(estimates.asked) <= 9
    assert len({(c.seq_len, c.stack) for c in estimates.asked}) == len(estimates.asked)


def test_host_memory_ends_it() -> None:
    """The optimizer's states would only need more of what is short."""
    plan = only(planned(MadeUp(upipe=(3000, 300_000, 1e-4))))

    assert plan.ended_by == "host memory"
    assert plan.configuration.stack == {}
    assert plan.longest is not None
    room = 2**41 * (1 - HOST_MARGIN) - 8 * HOST_PROCESS_BYTES
    assert plan.longest.seq_len == int(room / 300_000) // STEP * STEP


def test_a_method_that_cannot_run_and_one_that_never_fits() -> None:
    """Each is a row with its reason, and the others are not touched."""
    estimates = MadeUp(ring=(1e9, 1, 1e-4), ulysses=(9000, 1000, 1e-4))
    found = planned(estimates, methods="single ring ulysses")

    single, ring, ulysses = found.methods
    assert (single.ended_by, single.reason) == ("cannot run", "single needs a miracle")
    assert ring.longest is None
    assert ring.ended_by == "device memory"
    assert ulysses.longest is not None
    assert found.recommended is not None
    assert found.recommended.configuration.method == "ulysses"


def test_the_limit_of_the_search_is_said() -> None:
    """What needs next to nothing ends at the limit."""
    plan = only(planned(MadeUp(upipe=(1, 1, 1e-4))))

    assert plan.ended_by == "limit of the search"
    assert plan.too_long is None
    assert plan.longest is not None
    assert plan.longest.seq_len == 64 * MIB


def test_the_fastest_that_fits_is_recommended() -> None:
    """Saving attention is tried where host memory allows it; what is as fast within the uncertainty is named."""
    estimates = MadeUp(ring=(9000, 1000, 1e-5), ulysses=(5000, 1000, 3e-5), upipe=(4000, 1000, 1e-4))
    found = planned(estimates, seq_len=8 * MIB)

    assert found.recommended is not None
    assert found.recommended.configuration.method == "ulysses"
    assert found.recommended.configuration.stack["save_attention"] == "auto"
    budget = 2**41 - round(2**41 * HOST_MARGIN) - 8 * HOST_PROCESS_BYTES
    assert found.recommended.configuration.stack["host_budget_bytes"] == budget
    asked = {plan.method: plan.asked for plan in found.methods}
    assert asked["ring"] is not None
    assert asked["ring"].status == "oom_device"
    assert asked["upipe"] is not None
    assert asked["upipe"].status == "ok"


def test_nothing_is_recommended_when_nothing_fits() -> None:
    """The length asked is too long for all."""
    found = planned(MadeUp(ring=(9000, 1000, 1e-5)), seq_len=32 * MIB)

    assert found.recommended is None
    plan = only(found)
    assert plan.asked is not None
    assert plan.asked.status == "oom_device"
    assert plan.longest is not None


def test_a_length_that_no_method_takes_is_said() -> None:
    """It is no question of memory then."""
    found = planned(MadeUp(ring=(9000, 1000, 1e-5)), methods="single", seq_len=MIB)

    assert found.recommended is None
    assert _nothing(found).startswith("no method can run 1M here")
    assert "multiples of" not in _nothing(found)
    odd = planned(MadeUp(ring=(9000, 1000, 1e-5)), methods="single", seq_len=MIB + 1)
    assert "multiples of 64K" in _nothing(odd)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_tables_say_what_ends_each_method_in_any_window(width: int) -> None:
    """Numbers are whole, and reasons are there in full, also of a length that a method refuses."""
    reason = "ring: seq_len=1000001 is not divisible by 16 (2 x world_size=8); use 1000000 or 1000016"
    estimates = MadeUp(ulysses=(12_000, 1000, 1e-4))
    found = planned(estimates, methods="ring ulysses", seq_len=MIB)
    ring = found.methods[0].model_copy(update={"reason": reason, "ended_by": "divisibility"})
    found = found.model_copy(update={"methods": (ring, *found.methods[1:])})
    console = Console(file=io.StringIO(), width=width)
    _print(console, found)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    flat = " ".join(text.split())
    assert flat.count("not divisible by 16") == 2
    assert "optimizer_offload=true; then device memory:" in flat
    longest = found.methods[1].longest
    assert longest is not None
    assert format_bytes(longest.device_needed_bytes) in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_numbers_that_a_method_refuses_are_no_question_of_memory() -> None:
    """What ends a method whose ranks do not divide the heads is divisibility."""

    class Refusing(MadeUp):
        def estimate(self, case: Case) -> Estimate:
            return Estimate(case=case, reason="num_heads=32 is not divisible by world_size=6")

    assert only(planned(Refusing(ring=(1, 1, 1)))).ended_by == "divisibility"


def test_a_length_that_is_refused_in_the_search_ends_it() -> None:
    """What was found below stays, and the table says why no more is said of longer ones."""

    class Refusing(MadeUp):
        def estimate(self, case: Case) -> Estimate:
            if case.seq_len > 2 * MIB:
                return Estimate(case=case, reason=f"ring: seq_len={case.seq_len} is not divisible by 7")
            return super().estimate(case)

    plan = only(planned(Refusing(ring=(10, 10, 1e-5))))
    assert plan.longest is not None
    assert plan.longest.seq_len == 2 * MIB
    assert plan.too_long is None
    assert plan.ended_by == "divisibility"
    assert _then(plan) == f"divisibility: seq_len={2 * MIB + STEP} is not divisible by 7"


def test_the_command_gives_the_steps_time_enough() -> None:
    """Long steps are timed once, short ones three times; the limit is twice all steps and a start, in both forms."""
    for seconds, steps, limit in ((1e-5, 3, 1800), (3e-3, 1, 31200)):
        found = planned(MadeUp(ulysses=(9000, 1000, seconds)), seq_len=2 * MIB)
        choice = found.recommended
        assert choice is not None
        assert choice.point.step_seconds is not None
        assert limit >= 2 * (2 + steps) * choice.point.step_seconds + 900
        words = sweep_command(found.question, choice, model="llama3-8b")
        assert words[words.index("--steps") + 1] == str(steps)
        assert words[words.index("--timeout") + 1] == str(limit)
        scenario = parse_scenario(scenario_text(found.question, choice, model="llama3-8b"), name="it")
        assert (scenario.run.steps, scenario.run.timeout_seconds) == (steps, limit)
        assert "2 traced and" in duration_words(choice)


def test_more_ranks_reach_further() -> None:
    """Nodes are filled, and the step of lengths is one that the ranks can share."""
    found = planned(MadeUp(ulysses=(9000, 1000, 1e-4)), worlds=(6, 8, 16))

    lengths = [plan.longest.seq_len if plan.longest else 0 for plan in found.methods]
    assert lengths == sorted(lengths)
    assert found.step_tokens == {6: 3 * STEP, 8: STEP, 16: STEP}
    assert [plan.nodes for plan in found.methods] == [1, 1, 2]
    assert all(
        length % found.step_tokens[plan.world_size] == 0
        for plan, length in zip(found.methods, lengths, strict=True)
    )


def test_nodes_filled_in_part_are_refused() -> None:
    """Nine GPUs are no number of nodes of eight."""
    with pytest.raises(UsageError, match="multiple of 8"):
        planned(MadeUp(ulysses=(9000, 1000, 1e-4)), worlds=(9,))


@pytest.mark.parametrize("host_ram", [None, "1T"])
@pytest.mark.parametrize("seq_len", [None, 2 * MIB])
@pytest.mark.parametrize("worlds", [(8,), (8, 32)])
def test_the_command_means_the_recommended_case(
    seq_len: int | None, worlds: tuple[int, ...], host_ram: str | None
) -> None:
    """The scenario parses to the very case, and the flags name it; torchrun starts a node's share."""
    host = H100.host_memory_bytes if host_ram is None else 2**40
    estimates = MadeUp(ulysses=(9000, 1000, 1e-4))
    found = planned(estimates, worlds=worlds, seq_len=seq_len, host=host)
    choice = found.recommended
    assert choice is not None

    text = scenario_text(found.question, choice, model="llama3-8b", host_ram=host_ram)
    scenario = parse_scenario(text, name="it")
    (case,) = scenario.expand(mode="measure", device="cuda")
    (estimated,) = scenario.expand(mode="estimate", device="cuda")
    words = sweep_command(found.question, choice, model="llama3-8b", host_ram=host_ram)

    assert (case.method, case.seq_len, case.world_size) == (
        "ulysses",
        choice.point.seq_len,
        choice.world_size,
    )
    assert case.nodes == choice.nodes
    assert estimated.host_memory_bytes == (None if host_ram is None else host)
    asked = [case.model_copy(update={"steps": 1, "warmup": 0}) for case in estimates.asked]
    assert estimated.model_copy(update={"host_memory_bytes": host, "steps": 1, "warmup": 0}) in asked
    assert ("--host-ram" in words) == (host_ram is not None)
    changed = {k: v for k, v in case.stack.model_dump().items() if k in choice.configuration.stack}
    assert changed == choice.configuration.stack
    assert words[words.index("--method") + 1] == "ulysses"
    changes = [words[k + 1] for k, word in enumerate(words) if word == "--stack-option"]
    assert Stack.model_validate(STACKS["long"].model_dump() | flags.stack_changes(changes)) == case.stack
    assert ("--nodes" in words) == (choice.nodes > 1)
    line = shlex.split(torchrun_line(choice))
    assert int(line[line.index("--nproc-per-node") + 1]) * choice.nodes == choice.world_size


@pytest.mark.parametrize("worlds", [(8,), (8, 16, 32)])
def test_a_picture_is_drawn(tmp_path: Path, worlds: tuple[int, ...]) -> None:
    """Of every number of ranks, also where a method reaches nothing."""
    found = planned(MadeUp(ring=(1e9, 1, 1e-4), ulysses=(9000, 1000, 1e-4)), worlds=worlds)

    picture = write_plan_picture(found, tmp_path / "plan.png")

    assert picture.read_bytes().startswith(b"\x89PNG")


def test_times_of_what_does_not_fit_have_an_uncertainty_too() -> None:
    """Where nothing fits, the times shown at the length asked for are not said to be missing."""
    found = planned(MadeUp(ring=(1e9, 1, 1e-4)), seq_len=2**20)
    (plan,) = found.methods
    assert plan.longest is None
    assert plan.asked is not None
    asked = plan.asked.model_copy(update={"uncertainty": 0.15})

    told = found.model_copy(update={"methods": (plan.model_copy(update={"asked": asked}),)})

    assert (_uncertainty(found), _uncertainty(told)) == (None, 0.15)


def test_a_picture_of_nothing_that_runs_is_drawn(tmp_path: Path) -> None:
    """Where no method can run there are axes and the limit, and no complaint about an empty legend."""
    found = planned(MadeUp(), methods="ring ulysses")

    assert write_plan_picture(found, tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "ulises"], "ulysses"),
        (["--hardware", "h100"], "h100-80g"),
        (["--world", "0"], "whole number from 1 up"),
        (["--world", "12"], "multiple of 8"),
        (["--host-ram", "much"], "2T"),
        (["--seqlen", "-1"], "length"),
        (["--dtype", "float8"], "bfloat16"),
        (["--model", "llama3-9b"], "llama3-8b"),
    ],
)
def test_bad_input_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], words: str
) -> None:
    """A message that says what is allowed, exit code 2, and nothing written."""
    monkeypatch.chdir(tmp_path)

    result = CliRunner().invoke(app, ["plan", *arguments])

    assert result.exit_code == 2
    assert words in result.output
    assert not list(tmp_path.iterdir())


def test_an_interrupt_ends_all_processes(tmp_path: Path) -> None:
    """Ctrl-C of a plan: exit code 130, no process left, and no file but what was there before."""
    token = uuid.uuid4().hex
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {TOKEN: token, "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cpbench", "plan", "--method", "ulysses", "--model", "tiny", "--json"]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_until(
        lambda: any("estimate_server" in line for line in alive(token)), seconds=120, what="the server"
    )
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)

    assert process.returncode == 130, words
    assert alive(token) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_a_plan_of_a_small_model_by_the_command(tmp_path: Path) -> None:
    """Real estimates: table, files, and JSON that says the same."""
    arguments = ["plan", "--model", "tiny", "--method", "ulysses,single", "--world", "2", "--host-ram", "8G"]
    out = tmp_path / "out"

    result = CliRunner().invoke(app, [*arguments, "--seqlen", "128K", "--out", str(out)])

    assert result.exit_code == 0, result.output
    for words in (
        "estimated",
        "recommended for 128K on 2 ranks",
        "cpbench sweep",
        "--host-ram 8G",
        "torchrun",
    ):
        assert words in result.output
    found = ContextPlan.model_validate(json.loads((out / "plan.json").read_text()))
    ulysses = next(plan for plan in found.methods if plan.method == "ulysses")
    single = next(plan for plan in found.methods if plan.method == "single")
    assert ulysses.longest is not None
    assert ulysses.ended_by == "host memory"
    assert single.ended_by == "cannot run"
    assert (out / "plan.png").is_file()
