"""Slurm: the script and its quoting, what is refused, and jobs of a stand-in Slurm that really run."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cpbench.case import Case
from cpbench.cli import app
from cpbench.errors import RunFolderError
from cpbench.expand import ResolvedCase
from cpbench.record import read_record
from cpbench.run_folder import RunFolder
from cpbench.slurm import SlurmJob, script_text
from tests.cpbench.workers.harness import FAKE_WORKER, ROOT

RING = ["--method", "ring", "--model", "tiny", "--seqlen", "1K", "--dtype", "float32"]
SLURM = ["--launcher", "slurm", "--name", "mine"]
HOSTILE = "a b'\"$(touch broken)`touch broken`;touch broken#%j"

# What the job's `python` is: it notes its arguments, then runs the real command line with a worker without torch.
JOB_PYTHON = f"""\
import functools, sys
sys.path.insert(0, {str(ROOT)!r})
import cpbench.cli.sweep as command, cpbench.expand as expand
from cpbench.sweep import Sweep
expand.resolve_cases = lambda cases, plugins: [expand.ResolvedCase(case=case) for case in cases]
command.Sweep = functools.partial(Sweep, worker={FAKE_WORKER!r})
sys.argv[1:] = sys.argv[3:]
command_line = __import__("cpbench.cli", fromlist=["main"])
command_line.main()
"""
FAKES = {
    "sbatch": """#!/bin/bash
script="${@: -1}"
export SLURM_JOB_ID=41234 SLURM_JOB_NODELIST='n[1-2]'
unset SLURM_NODEID
log=$(dirname -- "$script")/slurm-41234.log
bash "$script" > "$log" 2>&1
echo $? > "$(dirname -- "$log")/slurm-code.log"
echo '41234;cluster'
""",
    "scontrol": "#!/bin/bash\nprintf 'localhost\\nsecond\\n'\n",
    "srun": """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
if [ "$1" = bash ]; then nodes="0 1"; else nodes=0; fi
for node in $nodes; do SLURM_NODEID=$node "$@" & done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
""",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder with no sbatch in sight, and resolves cases without torch."""

    def resolve(cases: Sequence[Case], plugins: Sequence[Path]) -> list[ResolvedCase]:
        return [
            ResolvedCase(case=case, unsupported="odd" if case.world_size == 3 else None) for case in cases
        ]

    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("cpbench.expand.resolve_cases", resolve)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return folder


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put sbatch, srun and scontrol on PATH, and a python for the job that notes each node's arguments."""
    folder = tmp_path / "bin of 'slurm'"
    folder.mkdir()
    (tmp_path / "job.py").write_text(JOB_PYTHON, encoding="utf-8")
    noted = shlex.quote(str(tmp_path / "node"))
    python = (
        f'#!/bin/bash\nprintf "%s\\0" "$@" > {noted}"${{SLURM_NODEID:-0}}"\n'
        f'exec {shlex.join([sys.executable, str(tmp_path / "job.py")])} "$@"\n'
    )
    for name, text in {**FAKES, "python": python}.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return tmp_path


def invoke(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["sweep", *args], env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def job(*, nodes: int, name: str = "mine") -> SlurmJob:
    return SlurmJob(
        command=("python", "-m", "cpbench", "sweep", f"--scenario={HOSTILE}"),
        folder=Path("/runs") / name,
        directory=Path("/work") / name,
        nodes=nodes,
        gpus_per_node=4,
        cases=3,
        timeout_seconds=100.5,
        extra=("--partition=gpu",),
    )


def noted(tmp_path: Path, node: int) -> list[str]:
    return (tmp_path / f"node{node}").read_text(encoding="utf-8").split("\0")[:-1]


def test_one_node_needs_no_rendezvous() -> None:
    """On one node srun gets the command as it is; the limit covers every case; own options come last."""
    lines = script_text(job(nodes=1)).splitlines()
    assert lines[:9] == [
        "#!/bin/bash",
        "#SBATCH --job-name=mine",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=11",
        "#SBATCH --output=/runs/mine/slurm-%j.log",
        "#SBATCH --no-requeue",
        "#SBATCH --partition=gpu",
    ]
    assert "set -euo pipefail" in lines
    assert shlex.split(lines[-1])[3:] == list(job(nodes=1).command)
    assert "rdzv" not in lines[-1]


def test_two_nodes_meet_at_the_first() -> None:
    """On two nodes each adds its own number to the command, and all get the first node and the job's port."""
    text = script_text(job(nodes=2))
    assert "port=$((20000 + SLURM_JOB_ID % 20000))" in text
    words = shlex.split(text.splitlines()[-1])
    assert words[3:7] == ["bash", "-c", 'exec "$@" --node-rank="$SLURM_NODEID"', "cpbench"]
    assert words[7:] == [*job(nodes=2).command, "--rdzv-endpoint=$head:$port"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_hostile_names_are_only_names(nodes: int, tmp_path: Path) -> None:
    """Quotes, commands and placeholders in names and paths stay text, for bash and for sbatch."""
    text = script_text(job(nodes=nodes, name=HOSTILE))
    subprocess.run(["/bin/bash", "-n"], input=text, text=True, check=True)
    options = [shlex.split(line, comments=False)[1:] for line in text.splitlines() if "#SBATCH" in line]
    assert [f"--job-name={HOSTILE}"] in options
    assert [f"--output=/runs/{HOSTILE.replace('%', '%%')}/slurm-%j.log"] in options
    words = subprocess.run(
        [
            "/bin/bash",
            "-c",
            "cd() { :; }; scontrol() { echo h; }; srun() { printf '%s\\n' \"$@\"; }\n" + text,
        ],
        env={"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "h"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert f"--scenario={HOSTILE}" in words
    assert not (tmp_path / "broken").exists()


BAD = [
    (["--launcher", "slrum"], "did you mean 'slurm'"),
    ([*SLURM, "--mode", "estimate"], "only measures"),
    ([*SLURM, "--node-rank", "1", "--nodes", "2"], "--rdzv-endpoint itself"),
    ([*SLURM, "--rdzv-endpoint", "a:1"], "--rdzv-endpoint itself"),
    ([*SLURM, "--world", "5", "--nodes", "2"], "does not divide"),
    ([*SLURM, "--world", "3"], "odd"),
    ([*SLURM, "--timeout", "inf"], "--timeout inf"),
    ([*SLURM, "--sbatch", "partition"], "--sbatch 'partition'"),
    ([*SLURM, "--sbatch=-pgpu"], "--sbatch '-pgpu'"),
    ([*SLURM, "--sbatch=--comment=a\ntouch broken"], "on one line"),
    ([*SLURM, "--sbatch=--comment=a\rb"], "on one line"),
    ([*SLURM, "--sbatch=--nodes=4"], "cpbench sets --nodes itself"),
    ([*SLURM, "--runs", "a\nb"], "unprintable"),
    (["--sbatch=--partition=gpu"], "needs --launcher slurm"),
    (["--launcher", "slurm", "--name", "../up"], "run name"),
]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("args", "phrase"), BAD, ids=[repr(args)[-30:] for args, _ in BAD])
def test_bad_input_is_refused_and_nothing_is_written(args: list[str], phrase: str, elsewhere: Path) -> None:
    """What cannot be a job gives exit code 2 and one message before anything is written or submitted."""
    code, _, err = invoke(*RING, *args)
    assert code == 2
    assert phrase in err
    assert list(elsewhere.iterdir()) == []


def test_a_dry_run_prints_the_script(elsewhere: Path) -> None:
    """--dry-run needs no Slurm and no GPU here, prints the script for cuda, and writes nothing."""
    code, out, _ = invoke(*RING, *SLURM, "--world", "8,16", "--nodes", "2", "--dry-run")
    assert code == 0
    assert "#SBATCH --gpus-per-node=8\n" in out
    assert "--launcher=local --mode=measure --device=cuda --nodes=2 --rdzv-endpoint=" in out
    code, out, _ = invoke(*RING, *SLURM, "--world", "4", "--device", "cpu", "--dry-run", "--json")
    script = json.loads(out)["script"]
    assert "--gpus-per-node" not in script
    assert "--device=cpu" in script
    assert "--nodes=1\n" in script
    assert list(elsewhere.iterdir()) == []


def test_without_sbatch_the_script_stays(elsewhere: Path) -> None:
    """Where Slurm is missing the message names the script and the command, and a second try may follow."""
    for _ in range(2):
        code, _, err = invoke(*RING, *SLURM, "--world", "2")
        assert code == 2
        script = elsewhere / "runs" / "mine" / "sweep.sbatch"
        assert f"sbatch {script}" in err
        assert [file.name for file in script.parent.iterdir()] == ["sweep.sbatch"]


def test_what_sbatch_says_is_passed_on(cluster: Path) -> None:
    """A refusal by sbatch gives exit code 2 with its words."""
    (cluster / "bin of 'slurm'" / "sbatch").write_text(
        "#!/bin/bash\necho 'invalid partition specified: gpu' >&2\nexit 1\n", encoding="utf-8"
    )
    code, _, err = invoke(*RING, *SLURM, "--world", "2", "--sbatch=--partition=gpu")
    assert code == 2
    assert "code 1 and said: invalid partition specified: gpu" in err


def test_the_folder_of_a_waiting_job_is_free_for_its_sweep(tmp_path: Path) -> None:
    """Script and output of a job do not make a folder foreign; other files still do, and nothing is made."""
    (tmp_path / "sweep.sbatch").touch()
    (tmp_path / "slurm-1.log").touch()
    RunFolder(tmp_path).check(resume=False)
    (tmp_path / "sweep.sbatch").unlink()
    with pytest.raises(RunFolderError, match="holds no run"):
        RunFolder(tmp_path).check(resume=False)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["slurm-1.log"]


@pytest.mark.slow
def test_a_job_on_one_node_leaves_a_run(cluster: Path, elsewhere: Path) -> None:
    """The submitted script runs the sweep; the same name is then taken, and --resume submits it again."""
    flags = [*RING, "--world", "2", "--device", "cpu", *SLURM, "--runs", "my runs"]
    code, out, err = invoke(*flags)
    run = elsewhere / "my runs" / "mine"
    assert code == 0, err
    assert "submitted job 41234" in out
    assert "squeue --job 41234" in out
    assert (run / "slurm-code.log").read_text() == "0\n", (run / "slurm-41234.log").read_text()
    assert [read_record(file).status for file in run.glob("cases/*.json")] == ["ok"]
    assert noted(cluster, 0)[:3] == ["-m", "cpbench", "sweep"]
    assert "--runs=my runs" in noted(cluster, 0)

    code, _, err = invoke(*flags)
    assert code == 2
    assert "--resume" in err

    code, out, err = invoke("--resume", *SLURM, "--runs", "my runs", "--json")
    assert code == 0, err
    assert json.loads(out)["job_id"] == "41234"
    assert (run / "slurm-code.log").read_text() == "0\n", (run / "slurm-41234.log").read_text()
    assert noted(cluster, 0)[3:] == ["--runs=my runs", "--resume", "--name=mine", "--launcher=local"]


@pytest.mark.slow
def test_a_job_on_two_nodes_is_one_run(cluster: Path, elsewhere: Path) -> None:
    """Both nodes run the same command but for their number, meet at the head node, and leave one record."""
    code, _, err = invoke(*RING, "--world", "2", "--nodes", "2", "--device", "cpu", *SLURM)
    run = elsewhere / "runs" / "mine"
    assert code == 0, err
    assert (run / "slurm-code.log").read_text() == "0\n", (run / "slurm-41234.log").read_text()
    assert noted(cluster, 0)[-2:] == ["--rdzv-endpoint=localhost:21234", "--node-rank=0"]
    assert noted(cluster, 1) == [*noted(cluster, 0)[:-1], "--node-rank=1"]
    (file,) = run.glob("cases/*.json")
    record = read_record(file)
    assert (record.status, record.nodes, record.world_size) == ("ok", 2, 2)
