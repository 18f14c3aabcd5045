"""Records one attention block of each method and remakes the pictures and tables of its page in `docs/methods`.

    python -m cpbench.report.method_pages [METHOD ...]

The recordings are real runs on CPU processes (`cpbench.block_recorder`), kept in `docs/methods/data`; a page is written
by hand but for what stands between its two marks.  `torch-ring`, which refuses CPU processes, is emulated there.
"""

from __future__ import annotations

import ast
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from cpbench import registry
from cpbench.block_schedule import BlockSchedule, BlockSchedules, PhaseName
from cpbench.case import Case, OptionValue
from cpbench.errors import CpbenchError, UnknownName
from cpbench.launch import Job, launch
from cpbench.model_config import ModelConfig
from cpbench.record import write_text_atomically
from cpbench.report.schedules import Block, write_schedule

FOLDER = Path(__file__).resolve().parents[2] / "docs/methods"
BEGIN = "<!-- recorded: made by `python -m cpbench.report.method_pages`, do not edit -->"
END = "<!-- end of what is recorded -->"
_RECORDED: dict[str, tuple[tuple[dict[str, OptionValue], int, int], ...]] = {
    "single": (({}, 1, 512),),
    "ring": (({}, 4, 512),),
    "ulysses": (({}, 4, 512),),
    "usp": (({"ring_degree": 2}, 4, 512),),
    "fpdt": (({"chunk_tokens": 128}, 4, 384),),
    "offload": (({}, 4, 512),),
    "upipe": (({}, 4, 512), ({"published": True}, 4, 512)),
    "torch-ring": (({}, 4, 512), ({"rotate": "alltoall"}, 4, 512)),
}
"""Options, ranks and tokens of every recording."""
_EMULATED = frozenset({"torch-ring"})
"""Methods that refuse CPU processes: one rank runs alone, as each of the ranks in turn."""
_WITHOUT_CPU = (
    "What runs is torch's own ring function, with this project's CPU kernel, because torch's sharded attention has no "
    "CPU operators.\n"
)
_ARCHITECTURE = ModelConfig(
    hidden_dim=1024, num_layers=1, num_heads=16, num_kv_heads=4, head_dim=64, ffn_dim=1024, vocab_size=512
)
_KINDS = {"all_to_all": "all-to-all", "all_gather": "all-gather", "send": "to the next rank"}


def cases(methods: Iterable[str]) -> list[Case]:
    """Return what is recorded of some methods.

    Raises:
        UnknownName: nothing is recorded of a method of this name.
    """
    found = []
    for method in methods:
        if method not in _RECORDED:
            raise UnknownName("recorded method", method, _RECORDED)
        for options, ranks, tokens in _RECORDED[method]:
            found.append(
                Case(
                    method=method,
                    options=options,
                    model="block",
                    architecture=_ARCHITECTURE,
                    seq_len=tokens,
                    world_size=ranks,
                    mode="emulate" if method in _EMULATED else "measure",
                )
            )
    return found


def record(methods: Iterable[str]) -> list[BlockSchedule]:
    """Run a block of each method on CPU processes: one launch for all that have real ranks, one for all others.

    Raises:
        CpbenchError: a launch failed; the message has the end of the log.
    """
    wanted = cases(methods)
    by_mode = [[case for case in wanted if case.mode == mode] for mode in ("measure", "emulate")]
    found = [schedule for some in by_mode if some for schedule in _launched(some)]
    order = {method: index for index, method in enumerate(dict.fromkeys(case.method for case in wanted))}
    return sorted(found, key=lambda s: order[s.method])


def _launched(wanted: Sequence[Case]) -> list[BlockSchedule]:
    with tempfile.TemporaryDirectory(prefix="cpbench-block-") as folder:
        job = Job(
            case=max(wanted, key=lambda case: case.world_size),
            scratch=Path(folder) / "scratch",
            log_dir=Path(folder) / "logs",
            timeout_seconds=600,
            worker=("-m", "cpbench.block_recorder"),
            extra={"cases": [case.model_dump(mode="json") for case in wanted]},
        )
        ended = launch(job, should_stop=lambda: False)
        report = job.folder / "report.json"
        if ended.code or not report.is_file():
            log = job.log_dir / "rank0.log"
            words = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.is_file() else ""
            raise CpbenchError(f"the recording ended with exit code {ended.code}\n{words}")
        return list(BlockSchedules.model_validate_json(report.read_text(encoding="utf-8")).schedules)


def load(method: str) -> list[BlockSchedule]:
    """Return the recordings of a method that are kept."""
    text = (FOLDER / "data" / f"{method}.json").read_text(encoding="utf-8")
    return list(BlockSchedules.model_validate_json(text).schedules)


def write(method: str, schedules: Sequence[BlockSchedule]) -> None:
    """Keep the recordings of a method, draw them and put its page's tables up to date."""
    kept = BlockSchedules(schedules=tuple(schedules)).model_dump_json(indent=None)
    (FOLDER / "data").mkdir(parents=True, exist_ok=True)
    # One line for each bar and each tensor, so that a change can be read as a diff.
    kept = kept.replace('{"lane"', '\n{"lane"').replace('],"', '],\n"')
    write_text_atomically(FOLDER / "data" / f"{method}.json", kept + "\n")
    blocks = [Block(s, _heading(s) if len(schedules) > 1 else "") for s in schedules]
    write_schedule(
        blocks, f"{method}: one attention block on one rank", _subtitle(schedules), FOLDER / f"{method}.png"
    )
    page = FOLDER / f"{method}.md"
    if page.is_file():
        write_text_atomically(page, replaced(page.read_text(encoding="utf-8"), tables(method, schedules)))


def replaced(page: str, text: str) -> str:
    """Return a page with something else between its marks.

    Raises:
        CpbenchError: it does not have both marks.
    """
    if BEGIN not in page or END not in page:
        raise CpbenchError(f"a page of a method needs the two marks\n{BEGIN}\n{END}")
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}"


def tables(method: str, schedules: Sequence[BlockSchedule]) -> str:
    """Return what is recorded beside the formulas, and the options, as Markdown."""
    parts = ["## Recorded against the formulas", _recorded(schedules)]
    options = method_options(registry.require(method))
    parts.append("## Options")
    if options:
        rows = [f"| `{name}` | `{_literal(default)}` | {words} |" for name, default, words in options]
        parts.append("\n".join(["| option | default | meaning |", "|---|---|---|", *rows]))
    else:
        parts.append("None.")
    return "\n\n".join(parts)


def method_options(source: Path) -> list[tuple[str, str, str]]:
    """Return name, default and docstring of every option, from a method's source, which is not run."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    name = next(
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METHOD"
    )
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    found = []
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or node.value is None:
            continue
        words = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            words = " ".join(str(following.value.value).split()).replace("|", "\\|")
        found.append((ast.unparse(node.target), ast.unparse(node.value), words))
    return found


def _recorded(schedules: Sequence[BlockSchedule]) -> str:
    several = len(schedules) > 1
    lines = ["| " + ("options | " if several else "") + "quantity | recorded | formula |"]
    lines.append("|---" * (3 + several) + "|")
    for s in schedules:
        first = f"| {_heading(s)} " if several else ""
        for words, recorded, stated in (
            ("forward peak", s.forward_peak_bytes, s.stated_forward_peak_bytes),
            ("backward peak", s.backward_peak_bytes, s.stated_backward_peak_bytes),
        ):
            lines.append(f"{first}| {words} | {s.in_units(recorded):.3f} M | {s.in_units(stated):.3f} M |")
        phases: tuple[PhaseName, ...] = ("forward", "backward")
        for phase in phases:
            recorded_bytes, stated_bytes = s.sent_by_kind(phase), s.stated_sent.get(phase, {})
            for kind in sorted(recorded_bytes | stated_bytes):
                sizes = (s.in_units(found.get(kind, 0)) for found in (recorded_bytes, stated_bytes))
                columns = " | ".join(f"{size:.3f} M" for size in sizes)
                lines.append(f"{first}| sent in {phase}, {_KINDS.get(kind, kind)} | {columns} |")
        again = sum(s.sent_by_kind("recomputation").values())
        lines.append(f"{first}| sent in the recomputation | {s.in_units(again):.3f} M | |")
        if any(s.host):
            lines.append(f"{first}| most in use on the host | {s.in_units(max(s.host)):.3f} M | |")
    return "\n".join(lines)


def _heading(s: BlockSchedule) -> str:
    return ", ".join(f"{name}={_literal(str(value))}" for name, value in s.given.items()) or "default"


def _literal(text: str) -> str:
    """An option's value as a user writes it."""
    return {"True": "true", "False": "false"}.get(text, text.strip("'\""))


def _subtitle(schedules: Sequence[BlockSchedule]) -> str:
    s = schedules[0]
    given = f" {_heading(s)};" if s.given and len(schedules) == 1 else ""
    return (
        f"{_how(s)}:{given} {s.num_heads} query and {s.num_kv_heads} KV heads of "
        f"{s.head_dim}, {s.seq_len} tokens, {s.dtype}.\n{_WITHOUT_CPU if s.emulated else ''}"
        "A column is one operation, in the order in which they were started; widths say nothing about time.\n"
        f"M = all query heads of a rank's tokens = {s.unit_bytes // 1024} KiB here. Left out: x, y, their gradients, "
        "what is of a weight's size, workspaces inside operators."
    )


def _how(s: BlockSchedule) -> str:
    """Where a recording comes from."""
    if s.emulated:
        return f"Recorded on CPU as rank {s.rank} of {s.world_size}, emulated (the others send what this one has)"
    ranks = "1 process" if s.world_size == 1 else f"{s.world_size} processes (rank {s.rank} is shown)"
    return f"Recorded in a real run on CPU, {ranks}"


def main(arguments: Sequence[str]) -> int:
    """Remake the pages of some methods, or of all."""
    methods = list(arguments) or list(_RECORDED)
    try:
        found = record(methods)
        for method in methods:
            write(method, [s for s in found if s.method == method])
            sys.stdout.write(f"{FOLDER / method}.md\n")
    except CpbenchError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
