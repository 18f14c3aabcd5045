"""The command line: its frozen surface, bad input, dry runs, JSON, exit codes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import cpbench.cli.sweep as sweep_command
from cpbench import registry
from cpbench.case import STACKS, Case
from cpbench.cli import app
from cpbench.expand import ResolvedCase
from cpbench.record import read_record
from cpbench.sweep import Sweep
from tests.cpbench.workers.harness import FAKE_WORKER, ROOT

SURFACE = {
    "doctor": {"--json", "--runs"},
    "explain": {
        "--batch",
        "--device",
        "--dtype",
        "--hardware",
        "--json",
        "--method",
        "--model",
        "--no-options",
        "--option",
        "--out",
        "--plugin",
        "--runs",
        "--seqlen",
        "--stack",
        "--stack-option",
        "--world",
    },
    "list": {"--json", "--plugin"},
    "plan": {
        "--batch",
        "--dtype",
        "--hardware",
        "--host-ram",
        "--json",
        "--method",
        "--model",
        "--out",
        "--plugin",
        "--seqlen",
        "--world",
    },
    "report": {"--baseline", "--json", "--out", "--runs"},
    "sweep": {
        "--batch",
        "--device",
        "--dry-run",
        "--dtype",
        "--hardware",
        "--host-ram",
        "--json",
        "--launcher",
        "--layers",
        "--method",
        "--mode",
        "--model",
        "--name",
        "--node-rank",
        "--nodes",
        "--option",
        "--plugin",
        "--rank",
        "--rdzv-endpoint",
        "--resume",
        "--runs",
        "--sbatch",
        "--scenario",
        "--seed",
        "--seqlen",
        "--stack",
        "--stack-option",
        "--steps",
        "--timeout",
        "--warmup",
        "--world",
    },
    "verify": {
        "--attention-bias",
        "--batch",
        "--block-only",
        "--device",
        "--dtype",
        "--full",
        "--head-dim",
        "--heads",
        "--hidden",
        "--json",
        "--kv-heads",
        "--layers",
        "--method",
        "--option",
        "--plugin",
        "--qk-norm",
        "--quick",
        "--random",
        "--seed",
        "--seqlen",
        "--timeout",
        "--world",
    },
}
SMALL = ["--model", "tiny", "--seqlen", "1K", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder, so that `runs/` is its own and anything written is seen."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Cases are resolved without starting torch: `ring` at world size 3 is unsupported. Collects the cases."""
    seen: list[Case] = []

    def resolve(cases: Sequence[Case], plugins: Sequence[Path]) -> list[ResolvedCase]:
        seen.extend(cases)
        bad = "world_size=3 is odd; choose 2"
        return [ResolvedCase(case=case, unsupported=bad if case.world_size == 3 else None) for case in cases]

    monkeypatch.setattr("cpbench.expand.resolve_cases", resolve)
    monkeypatch.setattr(sweep_command, "Sweep", functools.partial(Sweep, worker=FAKE_WORKER))
    return seen


def invoke(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_surface_is_frozen() -> None:
    """Adding or removing a command or a flag is a decision that this list records."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {
        name: {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}
        - {"--help"}
        for name, command in commands.items()
    }
    assert found == SURFACE


def test_every_flag_is_explained() -> None:
    """`--help` of every command says something about each of its flags."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)
        code, out, _ = invoke(name, "--help")
        assert code == 0
        assert "Usage" in out


def test_version() -> None:
    """`--version` prints name and version."""
    code, out, _ = invoke("--version")
    assert (code, out.split()[0]) == (0, "cpbench")


BAD = [
    (["--method", "rng"], "did you mean 'ring'"),
    (["--model", "tyny"], "did you mean 'tiny'"),
    (["--scenario", "smok"], "did you mean 'smoke'"),
    (["--scenario", "missing.toml"], "missing.toml cannot be read: No such file or directory"),
    (["--seqlen", "abc"], "'abc' is not a positive number"),
    (["--seqlen", "0"], "at least 1"),
    (["--seqlen=-4"], "'-4' is not a positive number"),
    (["--seqlen", "1.5"], "whole number"),
    (["--world", "0"], "--world '0'"),
    (["--world", "two"], "--world 'two'"),
    (["--world", "3", *SMALL], "world_size=3 is odd; choose 2"),
    (["--world", "100000", *SMALL], "100000 processes"),
    (["--batch", "0"], "--batch '0'"),
    (["--dtype", "float23"], "did you mean 'float32'"),
    (["--stack", "lng"], "did you mean 'long'"),
    (["--mode", "mesure"], "did you mean 'measure'"),
    (["--device", "gpu"], "--device"),
    (["--steps", "0"], "--steps"),
    (["--timeout", "-1"], "timeout_seconds"),
    (["--option", "upipe"], "method.field=value"),
    (["--option", "ring.x=1", "--method", "upipe"], "add --method ring"),
    (["--stack-option", "tile_mpl=true"], "did you mean 'tile_mlp'"),
    (["--stack-option", "tile_mlp"], "FIELD=VALUE"),
    (["--stack-option", "tile_mlp=maybe"], "tile_mlp"),
    (["--stack-option", "tile_mlp=true", "--stack-option", "tile_mlp=false"], "given twice"),
    (["--seqlen", ""], "--seqlen '' has no value"),
    (["--method", ""], "--method '' has no value"),
    (["--world", ","], "--world ',' has no value"),
    (["--model", ""], "--model '' has no value"),
    (["--seqlen", "99999999999999M"], "more than 1024M tokens"),
    (["--seqlen", "9" * 5000], "more than 1024M tokens"),
    (["--hardware", "h100"], "did you mean 'h100-80g'"),
    (["--option", "ulises.x=1"], "unknown method 'ulises'; did you mean 'ulysses'"),
    (["--plugin", "missing.py"], "missing.py"),
    (["--name", "../up"], "run name"),
    (["--resume"], "--resume needs --name"),
    (["--resume", "--name", "never-ran"], "run.json is missing"),
    (["--nodes", "2", *SMALL], "--rdzv-endpoint"),
    (["--nodes", "2", "--rdzv-endpoint", "a:1", *SMALL], "--name"),
    (["--node-rank", "1", *SMALL], "--node-rank 1 must be below --nodes 1"),
    (["--node-rank", "1", "--nodes", "2", "--mode", "estimate"], "the mode is estimate; leave it out"),
    (["--world", "12", "--mode", "estimate"], "--world 12 fills 2 nodes of 8 GPUs only in part"),
    (
        ["--world", "16", "--nodes", "1", "--mode", "estimate"],
        "16 ranks a node, but a node of h100-80g has 8",
    ),
    (["--mode", "emulate", "--device", "cuda"], "this machine has none; use --device cpu"),
    (["--nodes", "2", "--world", "5", "--name", "r", "--rdzv-endpoint", "a:1", *SMALL], "does not divide"),
    (["--no-such-flag"], "--no-such-flag"),
]


@pytest.mark.usefixtures("resolved")
@pytest.mark.parametrize(("args", "phrase"), BAD, ids=[" ".join(args)[:40] for args, _ in BAD])
def test_bad_input_is_refused_and_nothing_is_written(
    args: list[str], phrase: str, empty_folder: Path
) -> None:
    """Wrong input gives exit code 2, one message that has the value, no traceback, and no file."""
    code, out, err = invoke("sweep", *args)
    assert code == 2
    assert phrase in " ".join(err.split())
    assert "Traceback" not in out + err
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["[sweep", "[swep]\nmethod = 'ring'", "[sweep]\nseq_len = 'x'", "[sweep]\nworld_size = 'four'", "x = 1"],
)
def test_a_bad_scenario_file_is_refused(text: str, tmp_path: Path, empty_folder: Path) -> None:
    """Malformed TOML, unknown keys and wrong types in a file are usage errors too."""
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    code, _, err = invoke("sweep", "--scenario", str(file))
    assert code == 2
    assert f"'mine' (file {file})" in err
    assert list(empty_folder.iterdir()) == []


@pytest.mark.usefixtures("resolved")
def test_an_unwritable_output_folder_is_refused(tmp_path: Path) -> None:
    """A folder that cannot be made is named, with exit code 2."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    code, _, err = invoke(
        "sweep", "--method", "single", "--world", "1", *SMALL, "--runs", str(tmp_path / "file")
    )
    assert code == 2
    assert "--runs" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
@pytest.mark.usefixtures("resolved")
def test_a_read_only_output_folder_is_refused(empty_folder: Path) -> None:
    """A read-only folder is named, with exit code 2."""
    empty_folder.chmod(0o500)
    code, _, err = invoke("sweep", "--method", "single", "--world", "1", *SMALL)
    assert code == 2
    assert "Permission denied" in err


@pytest.mark.usefixtures("resolved")
def test_dry_run_lists_and_writes_nothing(empty_folder: Path) -> None:
    """--dry-run shows ids, mode and reasons; exit code 0 as long as something can run."""
    code, out, _ = invoke("sweep", "--method", "ring", "--world", "2,3", *SMALL, "--dry-run")
    assert code == 0
    assert "2 cases (1 unsupported), mode measure on cpu" in out
    assert "unsupported: world_size=3 is odd" in out
    assert list(empty_folder.iterdir()) == []


@pytest.mark.usefixtures("resolved")
def test_dry_run_as_json() -> None:
    """--dry-run --json is one JSON document with the cases as they would run."""
    code, out, _ = invoke("sweep", "--method", "ring", "--world", "2,3", *SMALL, "--dry-run", "--json")
    body = json.loads(out)
    assert code == 0
    assert [case["unsupported"] is None for case in body["cases"]] == [True, False]
    assert body["mode"] == "measure"


def test_commas_and_repeats_and_options_make_axes(resolved: list[Case]) -> None:
    """Lists with commas and repeated flags mean the same; option values keep their types."""
    flags = [
        "--method",
        "ring,upipe",
        "--method",
        "ulysses",
        "--seqlen",
        "1K,2K",
        "--world",
        "2",
        "--device",
        "cpu",
    ]
    invoke("sweep", *flags, "--model", "tiny", "--option", "upipe.stage_heads=4,8", "--dry-run")
    assert [(case.method, case.seq_len, case.options) for case in resolved] == [
        ("ring", 1024, {}),
        ("ring", 2048, {}),
        ("upipe", 1024, {"stage_heads": 4}),
        ("upipe", 1024, {"stage_heads": 8}),
        ("upipe", 2048, {"stage_heads": 4}),
        ("upipe", 2048, {"stage_heads": 8}),
        ("ulysses", 1024, {}),
        ("ulysses", 2048, {}),
    ]


def test_flags_override_the_scenario(resolved: list[Case]) -> None:
    """A flag replaces the scenario's list or value and leaves the rest."""
    invoke("sweep", "--scenario", "smoke", "--method", "ring", "--seqlen", "1K", "--steps", "7", "--dry-run")
    (case,) = resolved
    assert (case.method, case.seq_len, case.world_size, case.steps, case.model) == (
        "ring",
        1024,
        4,
        7,
        "smoke",
    )


def test_host_memory_is_that_of_estimates(resolved: list[Case]) -> None:
    """Another size is part of an estimated case; one that is measured is judged by no profile."""
    flags = ("sweep", "--method", "ring", *("--world", "2", "--host-ram", "512G"), "--dry-run")
    invoke(*flags, "--mode", "estimate")
    invoke(*flags, *SMALL)
    estimated, measured = resolved
    assert (estimated.hardware, estimated.host_memory_bytes) == ("h100-80g", 2**39)
    assert (measured.hardware, measured.host_memory_bytes) == (None, None)


def test_stack_options_change_every_case(resolved: list[Case]) -> None:
    """--stack-option sets single parts of the stack, as a scenario's [stack] table does."""
    changes = ("optimizer_offload=true", "save_attention=auto", "host_budget_bytes=1.5TiB", "tile_mlp=false")
    flags = [part for change in changes for part in ("--stack-option", change)]
    invoke("sweep", "--method", "ring", "--world", "2", *SMALL, *flags, "--dry-run")
    (case,) = resolved
    assert case.stack == STACKS["long"].model_copy(
        update={
            "optimizer_offload": True,
            "save_attention": "auto",
            "host_budget_bytes": 3 * 2**39,
            "tile_mlp": False,
        }
    )


@pytest.mark.usefixtures("resolved")
@pytest.mark.parametrize(("timeout", "warned"), [("1800", True), ("200000", False)])
def test_a_time_limit_that_cannot_suffice_is_said(
    timeout: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A case that takes longer than --timeout even at the peak of the devices is warned of, with a better limit."""
    monkeypatch.setattr("cpbench.expand.visible_gpus", lambda: (("a GPU",), None))
    flags = ["--method", "upipe", "--seqlen", "5M", "--mode", "emulate", "--device", "cuda"]
    code, _, err = invoke("sweep", *flags, "--timeout", timeout, "--dry-run")
    assert code == 0
    assert ("1 case cannot end within --timeout 1800" in err) == warned
    assert ("try --timeout" in err) == warned


@pytest.mark.slow
@pytest.mark.usefixtures("resolved")
def test_a_sweep_from_flags_to_records(empty_folder: Path) -> None:
    """A sweep leaves a run folder, says where it is and what comes next; a second one needs --resume."""
    flags = ["sweep", "--method", "ring", "--world", "2,3", *SMALL, "--name", "mine"]
    code, out, err = invoke(*flags)
    assert code == 0, out + err
    statuses = [read_record(file).status for file in sorted(empty_folder.glob("runs/mine/cases/*.json"))]
    assert sorted(statuses) == ["ok", "unsupported"]
    assert "records: runs/mine  (1 ok, 1 unsupported)" in out
    assert "next: cpbench report runs/mine" in out

    code, _, err = invoke(*flags)
    assert code == 2
    assert "--resume" in err

    code, out, _ = invoke("sweep", "--resume", "--name", "mine", "--json")
    body = json.loads(out)
    assert code == 0
    assert body["counts"] == {"ok": 1, "unsupported": 1}
    assert body["records"][0]["mode"] == "measure"

    code, _, err = invoke("sweep", "--method", "single", "--world", "1", *SMALL, "--name", "mine", "--resume")
    assert code == 2
    assert "does not have 1 of the requested cases" in err


def test_methods_are_listed_with_their_options() -> None:
    """Names, defaults and meanings of the options are those of the method when it is loaded."""
    rows = {row["name"]: row for row in json.loads(invoke("list", "methods", "--json")[1])}
    for name, row in rows.items():
        options = {option["name"]: option["default"] for option in row["options"]}
        loaded = registry.resolved_options(registry.load(name, {}))
        assert options == {
            key: str(value).lower() if isinstance(value, bool) else str(value)
            for key, value in loaded.items()
        }
        assert all(option["doc"] for option in row["options"]), name
    assert "stage_heads=0  Query heads of a stage" in " ".join(invoke("list", "methods")[1].split(" "))


def test_all_stands_for_every_method(resolved: list[Case]) -> None:
    """`--method all` of a sweep has every method that there is, as in verify."""
    invoke("sweep", "--method", "all", "--world", "2", *SMALL, "--dry-run")
    rows = json.loads(invoke("list", "methods", "--json")[1])
    assert {case.method for case in resolved} == {row["name"] for row in rows}


def test_help_flows_and_names_no_types() -> None:
    """`verify --help` breaks no line before the window ends, and its values have names as those of other commands."""
    out = CliRunner().invoke(app, ["verify", "--help"], env={"COLUMNS": "100", "TERM": "dumb"}).stdout
    assert "also recomputed and with its output kept in host memory" in " ".join(out.split())
    lines = [line.strip() for line in out.splitlines()]
    start = next(k for k, line in enumerate(lines) if line.startswith("Output and every gradient"))
    assert all(len(line) > 75 for line in lines[start : start + 4])
    assert "cpbench verify --method mine --plugin mine.py --full" in lines
    for kind in ("<str>", "<int>", "<float>", "<list"):
        assert kind not in out
    assert "[RUN] [CASE]..." in invoke("explain", "--help")[1]


@pytest.mark.parametrize(
    ("kind", "name"), [("methods", "ring"), ("models", "llama3-8b"), ("scenarios", "smoke")]
)
def test_lists_as_text_and_json(kind: str, name: str) -> None:
    """Every list has names with descriptions, as text and as JSON."""
    code, out, _ = invoke("list", kind)
    assert code == 0
    assert name in out
    rows = json.loads(invoke("list", kind, "--json")[1])
    assert name in {row["name"] for row in rows}
    assert all(row["description"] for row in rows)


def test_an_unknown_list_is_refused() -> None:
    """A kind that cannot be listed is a usage error that names those that can, and the nearest."""
    code, _, err = invoke("list", "method")
    assert code == 2
    assert "did you mean 'methods'? Known: hardware, methods, models, scenarios" in err


@pytest.mark.parametrize("arguments", [("plan", "--method"), ("explain", "--seqlen"), ("verify", "--method")])
def test_an_empty_value_is_no_default(arguments: tuple[str, str], empty_folder: Path) -> None:
    """What an unset variable of a shell leaves is refused by every command, before anything runs."""
    code, _, err = invoke(*arguments, "")
    assert code == 2
    assert f"{arguments[1]} '' has no value" in err
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize("command", ["plan", "explain"])
def test_a_folder_that_cannot_be_written_is_said_first(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--out is named, not --runs, and no estimate has run."""

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("an estimate ran")

    monkeypatch.setattr(f"cpbench.cli.{command}._{'found' if command == 'plan' else 'explained'}", unexpected)
    (tmp_path / "file").write_text("", encoding="utf-8")
    code, _, err = invoke(command, "--out", str(tmp_path / "file" / "out"))
    assert code == 2
    assert "choose another place with --out" in err
    assert "run" not in err.replace(str(tmp_path), "")


@pytest.mark.usefixtures("resolved")
def test_exclude_rules_that_do_nothing_are_said(tmp_path: Path) -> None:
    """A rule with an unknown method is refused; one that matches no case of its scenario is warned of."""
    text = "[sweep]\nmethod = 'ring'\nmodel = 'tiny'\n[[exclude]]\nmethod = '{}'\n"
    file = tmp_path / "mine.toml"
    file.write_text(text.format("rng"), encoding="utf-8")
    code, _, err = invoke("sweep", "--scenario", str(file), "--dry-run", "--device", "cpu")
    assert (code, "unknown method of an [[exclude]] rule 'rng'; did you mean 'ring'" in err) == (2, True)
    file.write_text(text.format("upipe"), encoding="utf-8")
    code, _, err = invoke("sweep", "--scenario", str(file), "--dry-run", "--device", "cpu")
    assert (code, "rule method = upipe of scenario 'mine' matches none" in err) == (0, True)
    file.write_text(text.replace("'ring'", "['ring', 'upipe']").format("upipe"), encoding="utf-8")
    code, _, err = invoke(
        "sweep", "--scenario", str(file), "--method", "ring", "--dry-run", "--device", "cpu"
    )
    assert (code, err) == (0, "")


def test_report_of_an_unknown_run_is_refused(empty_folder: Path) -> None:
    """A run that does not exist is named together with the runs there are."""
    (empty_folder / "runs" / "mine").mkdir(parents=True)
    (empty_folder / "runs" / "mine" / "run.json").write_text("{}", encoding="utf-8")
    code, _, err = invoke("report", "nine")
    assert code == 2
    assert "'nine'" in err
    assert "mine" in err


def test_the_command_line_needs_no_torch() -> None:
    """Importing the command line imports neither torch, pandas nor a plotting library, and no method."""
    heavy = "('torch', 'pandas', 'matplotlib', 'plotly', 'methods')"
    code = f"import sys, cpbench.cli; print([m for m in sys.modules if m.split('.')[0] in {heavy}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
