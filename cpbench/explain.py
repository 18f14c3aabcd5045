"""Runs `cpbench explain`: estimates a case, takes its peak apart, and estimates it again with other stack options."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cpbench.case import Case, Stack
from cpbench.errors import UsageError, without_name
from cpbench.expand import resolve_cases
from cpbench.explanation import Anatomy, Explanation, OptionEffect
from cpbench.hardware import fit, load_hardware, pinnable_bytes
from cpbench.launch import child_environment
from cpbench.run_folder import RunFolder

_SECONDS = 1800.0
_SWITCHES = ("tile_mlp", "tile_norm", "tile_loss", "optimizer_offload")


class CaseCannotRun(UsageError):
    """The method refuses the case; other cases may run."""


def cases_of_run(folder: Path, names: Sequence[str]) -> tuple[list[Case], tuple[Path, ...]]:
    """Return the cases of a run whose ids begin with the given texts, and the run's plug-ins.

    Raises:
        UsageError: no case or several cases begin with a text.
        RunFolderError: the folder holds no run.
    """
    info = RunFolder(folder).read_info()
    plugins = tuple(Path(path) for path in info.plugins)
    requested = info.scenario.expand(mode=info.mode, device=info.device)
    resolved = {item.case.case_id: item.case for item in resolve_cases(requested, plugins)}
    found = []
    for name in names:
        fitting = [case_id for case_id in resolved if case_id.startswith(name)]
        if len(fitting) != 1:
            known = ", ".join(fitting or resolved)
            raise UsageError(f"case {name!r}: {len(fitting)} cases of the run begin so; its cases: {known}")
        found.append(resolved[fitting[0]])
    return found, plugins


def explain(
    case: Case,
    plugins: Sequence[Path],
    *,
    options: bool = True,
    said: Callable[[str], None] = lambda _: None,
) -> Explanation:
    """Return why the peak of a case is where it is.

    Args:
        case: as asked for or resolved; it is estimated, whatever its mode.
        plugins: files of further methods.
        options: also estimate it with each stack option changed.
        said: told what runs.

    Raises:
        CaseCannotRun: the method refuses it.
        UsageError: an option is wrong.
    """
    asked = case.model_copy(update={"mode": "estimate"})
    changes = list(_changed(asked.stack, asked.architecture.num_layers)) if options else []
    variants = [asked.model_copy(update={"stack": stack}) for _, _, stack in changes]
    said(f"resolving {case.title}")
    item, *others = resolve_cases([asked, *variants], plugins)
    if item.unsupported:
        raise CaseCannotRun(f"{case.title}: {without_name(item.unsupported, case.method)}")
    running = [other.case for other in others if not other.unsupported]
    said(f"estimating {case.title}" + (f" and {len(running)} variants of its stack" if running else ""))
    first, *rest = _ask([item.case, *running], plugins)
    if "unsupported" in first:
        raise CaseCannotRun(f"{case.title}: {without_name(str(first['unsupported']), case.method)}")
    answers = iter(rest)
    effects = [
        _effect(name, value, {"unsupported": other.unsupported} if other.unsupported else next(answers))
        for (name, value, _), other in zip(changes, others, strict=True)
    ]
    return Explanation(
        case=item.case,
        anatomy=Anatomy.model_validate(first),
        options=tuple(
            sorted(effects, key=lambda effect: (effect.peak_bytes is None, effect.peak_bytes or 0))
        ),
        **_rooms(item.case),
    )


def _changed(stack: Stack, layers: int) -> Iterator[tuple[str, str, Stack]]:
    """Every option of a stack changed, one at a time; options that another needs are left alone."""
    raw = stack.model_dump()
    other: list[tuple[str, Any]] = [("checkpoint", "none" if stack.checkpoint == "full" else "full")]
    other.append(("offload", "none" if stack.offload == "inputs" else "inputs"))
    other += [(name, not raw[name]) for name in _SWITCHES]
    if stack.checkpoint == "full":
        other.append(("save_attention", 0 if stack.save_attention else layers))
    for name, value in other:
        try:
            changed = Stack.model_validate(raw | {name: value})
        except ValidationError:
            continue
        yield name, str(value).lower(), changed


def _effect(name: str, value: str, answer: dict[str, Any]) -> OptionEffect:
    if "unsupported" in answer:
        return OptionEffect(option=name, value=value, peak_bytes=None, reason=str(answer["unsupported"]))
    return OptionEffect(
        option=name, value=value, peak_bytes=answer["peak_bytes"], host_bytes=answer["host_bytes"]
    )


def _rooms(case: Case) -> dict[str, int]:
    """Bytes that tensors may take on the device of the case's machine profile, and pinned host memory of a rank."""
    if case.hardware is None:
        return {}
    hardware = load_hardware(case.hardware)
    overhead = fit(case, hardware, peak_bytes=0, host_bytes=0).device_needed_bytes
    device = int((hardware.usable_memory_bytes - overhead) / (1 + hardware.margin))
    on_node = min(case.world_size // case.nodes, hardware.gpus_per_node)
    return {"device_bytes": device, "host_room_bytes": pinnable_bytes(case, hardware) // on_node}


def _ask(cases: Sequence[Case], plugins: Sequence[Path]) -> list[dict[str, Any]]:
    """Run the worker: the anatomy of the first case, the peaks of the others.

    Raises:
        RuntimeError: it failed without saying why; a defect of cpbench.
    """
    request = {
        "cases": [case.model_dump(mode="json") for case in cases],
        "plugins": [str(path.absolute()) for path in plugins],
    }
    done = subprocess.run(
        [sys.executable, "-m", "cpbench.explain_worker"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=child_environment(None, single_node=True),
        timeout=_SECONDS,
        check=False,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if done.returncode or not isinstance(answer, list) or len(answer) != len(cases):
        tail = "\n".join(done.stderr.splitlines()[-15:])
        raise RuntimeError(f"cpbench.explain_worker ended with code {done.returncode} and no answer:\n{tail}")
    return answer
