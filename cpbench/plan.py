"""Answers "which method, and how long a context fits?" by searching over estimates.

For every method and number of ranks: the longest context that fits, with the best of the option sets its file declares
(`PLAN_OPTIONS`) and of the stack, and what a step of the length asked for takes with the fastest of them.  Whether a
length fits is always the estimate of that very length; the neighbour one step further was estimated too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpbench import registry
from cpbench.bracket import Bracket, LengthSearch, Room
from cpbench.case import STACKS, Case
from cpbench.context_plan import (
    Configuration,
    ContextPlan,
    End,
    MethodPlan,
    Point,
    Question,
    StackChange,
)
from cpbench.estimates import Estimates, Search, answered
from cpbench.hardware import Hardware, nodes_of, pinnable_bytes
from cpbench.recommendation import recommended
from cpbench.units import MIB, format_length

STEP = 65536
"""Lengths are multiples of this, and of what any layout of the ranks needs."""
LIMIT = 64 * MIB
"""Longer contexts are not searched for."""
_STACK = "long"
_REFUSED = Room(-1, -1)
"""Room of a length that a method refuses: the search goes on below it."""
_DIVIDES = re.compile(r"divi(?:de|sib)|multiple of")
_FIRST_TOKENS = MIB // 8
"""Tokens of a rank that the search starts with."""
_SLOW_FIRST = ("fpdt", "upipe")  # their estimates take longest, so they start first


def plan_context(
    question: Question,
    hardware: Hardware,
    estimates: Estimates,
    *,
    plugins: Sequence[Path] = (),
    said: Callable[[str], None] = lambda _: None,
) -> ContextPlan:
    """Return the longest context of every method, and what to run.

    Args:
        question: what is asked; its host memory counts, not that of `hardware`.
        hardware: the profile of `question.hardware`.
        estimates: answers for single cases.
        plugins: files of further methods.
        said: told a line for every method that is done.

    Raises:
        UsageError: a number of ranks that does not fill whole nodes, or options declared wrongly.
    """
    searches = [
        _Search(question, hardware, method, world, plugins)
        for world in question.worlds
        for method in question.methods
    ]
    order = sorted(searches, key=lambda search: search.method not in _SLOW_FIRST)
    found: dict[tuple[str, int], MethodPlan] = {}
    for _, answer in answered([search.run() for search in order], estimates):
        found[answer.method, answer.world_size] = answer
        said(f"[{len(found)}/{len(searches)}] {_told(answer)}")
    plans = tuple(found[search.method, search.world] for search in searches)
    return ContextPlan(
        question=question,
        step_tokens={search.world: search.unit for search in searches},
        device_memory_bytes=hardware.usable_memory_bytes,
        methods=plans,
        recommended=recommended(plans, asked=question.seq_len is not None),
    )


class _FailedError(Exception):
    """An estimate failed or the configuration cannot run; the words say why."""

    def __init__(self, words: str, *, failed: bool) -> None:
        super().__init__(words)
        self.failed = failed


@dataclass(slots=True)
class _Found:
    """A configuration's search."""

    configuration: Configuration
    bracket: Bracket
    points: dict[int, Point]
    refused: dict[int, str]
    """Why the method takes no such length, though it takes others."""


@dataclass(slots=True)
class _Search:
    """One method on a number of ranks."""

    question: Question
    hardware: Hardware
    method: str
    world: int
    plugins: Sequence[Path]
    unit: int = field(init=False)
    nodes: int = field(init=False)

    def __post_init__(self) -> None:
        self.unit = math.lcm(STEP, 2 * self.world)
        self.nodes = nodes_of(self.world, self.hardware)

    def run(self) -> Search[MethodPlan]:
        """Search, and look at the length asked for."""
        sets = registry.plan_options(registry.require(self.method, self.plugins))
        configurations = [Configuration(method=self.method, options=options) for options in sets]
        best, problem = yield from self._best(configurations)
        common: dict[str, Any] = {"method": self.method, "world_size": self.world, "nodes": self.nodes}
        if best is None:
            ended = _ended(problem)
            return MethodPlan(
                **common, configuration=configurations[0], ended_by=ended, reason=str(problem or "")
            )
        yield from self._add_short(best)
        asked: dict[str, Any] = {}
        if self.question.seq_len is not None:
            asked = yield from self._asked(self.question.seq_len, best, configurations)
        longest, beyond = best.bracket.longest, best.bracket.shortest_too_long
        too_long = None if beyond is None else best.points.get(beyond)
        refused = None if beyond is None else best.refused.get(beyond)
        ended = "limit of the search" if refused is None else "divisibility"
        if too_long is not None:
            ended = "device memory" if too_long.status == "oom_device" else "host memory"
        return MethodPlan(
            **common,
            **asked,
            configuration=best.configuration,
            longest=best.points[longest] if longest else None,
            too_long=too_long,
            ended_by=ended,
            reason=refused if too_long is None else too_long.reason,
            points=tuple(point for _, point in sorted(best.points.items())),
        )

    def _best(
        self, configurations: Sequence[Configuration]
    ) -> Search[tuple[_Found | None, _FailedError | None]]:
        """The configuration with the longest context: an option set is searched only if it goes further.

        The optimizer's states go to host memory if device memory is what ends the best of them.
        """
        best: _Found | None = None
        problem: _FailedError | None = None
        for configuration in configurations:
            try:
                best = yield from self._further(configuration, best)
            except _FailedError as error:  # another option set may run
                problem = problem or error
        if best is not None and self._ends_by_device(best):
            with suppress(_FailedError):  # what was found without it still holds
                best = yield from self._without_states(best)
        return best, problem

    def _without_states(self, best: _Found) -> Search[_Found]:
        """The search with the optimizer's states in host memory; it starts where their bytes should lead."""
        configuration = best.configuration.model_copy(update={"stack": {"optimizer_offload": True}})
        slope, beyond = best.bracket.slope, best.bracket.shortest_too_long
        if slope is None or slope.device <= 0 or beyond is None:
            return (yield from self._further(configuration, best))
        states = 8 * self.question.architecture.num_params / self.world
        room = best.bracket.samples[beyond].device + states
        start = int(beyond + room / slope.device)
        found = yield from self._searched(configuration, start=start, slope=slope)
        return found if found.bracket.longest > best.bracket.longest else best

    def _further(self, configuration: Configuration, best: _Found | None) -> Search[_Found]:
        """The search of a configuration, or what was the best before if it does not go further."""
        if best is None:
            return (yield from self._searched(configuration, start=self.world * _FIRST_TOKENS))
        beyond = best.bracket.shortest_too_long
        if beyond is None:
            return best
        point = yield from self._point(configuration, beyond)
        if not self._room(point).fits:
            return best
        slope = best.bracket.slope
        return (yield from self._searched(configuration, start=beyond, slope=slope, known=point))

    def _searched(
        self,
        configuration: Configuration,
        *,
        start: int,
        slope: Room | None = None,
        known: Point | None = None,
    ) -> Search[_Found]:
        points = {} if known is None else {known.seq_len: known}
        refused: dict[int, str] = {}
        search = LengthSearch(unit=self.unit, limit=LIMIT, start=start, slope=slope)
        while (length := search.next_length) is not None:
            try:
                if length not in points:
                    points[length] = yield from self._point(configuration, length)
                search.add(length, self._room(points[length]))
            except _FailedError as error:
                if error.failed or not points:
                    raise
                refused[length] = str(error)
                search.add(length, _REFUSED)
        return _Found(configuration, search.found, points, refused)

    def _room(self, point: Point) -> Room:
        return Room(
            self.hardware.usable_memory_bytes - point.device_needed_bytes,
            self.question.host_memory_bytes - point.host_needed_bytes,
        )

    def _add_short(self, best: _Found) -> Search[None]:
        """Where the search began far up, the length at which others began, so that a picture can compare them."""
        short = max(self.world * _FIRST_TOKENS // self.unit, 1) * self.unit
        if min(best.points) > short:
            best.points[short] = yield from self._point(best.configuration, short)

    def _ends_by_device(self, best: _Found) -> bool:
        beyond = best.bracket.shortest_too_long
        return beyond in best.points and best.points[beyond].status == "oom_device"

    def _asked(
        self, length: int, best: _Found, configurations: Sequence[Configuration]
    ) -> Search[dict[str, Any]]:
        """The fastest configuration that fits at a length; attention is saved too, where host memory allows it."""
        tried: list[tuple[Point, Configuration]] = []
        problem: _FailedError | None = None
        for configuration in self._candidates(best, configurations):
            try:
                known = best.points.get(length) if configuration == best.configuration else None
                tried.append((known or (yield from self._point(configuration, length)), configuration))
            except _FailedError as error:
                problem = problem or error
        if not tried:
            return {"asked_reason": str(problem or "")}
        point, configuration = min(tried, key=self._preference)
        if point.status == "ok":
            budget = pinnable_bytes(self._case(configuration, length), self.hardware)
            saving: dict[str, StackChange] = {"save_attention": "auto", "host_budget_bytes": budget}
            saved = configuration.model_copy(update={"stack": configuration.stack | saving})
            with suppress(_FailedError):  # offload saves by itself, and some methods cannot
                tried.append(((yield from self._point(saved, length)), saved))
            point, configuration = min(tried, key=self._preference)
        return {"asked": point, "asked_configuration": configuration}

    def _candidates(self, best: _Found, configurations: Sequence[Configuration]) -> Iterator[Configuration]:
        yield from configurations
        if best.configuration not in configurations:
            yield best.configuration

    def _preference(self, item: tuple[Point, Configuration]) -> tuple[bool, float, int, int]:
        """Fits before does not; then the fastest, then the leanest, then the simplest."""
        point, configuration = item
        if point.status != "ok":
            return True, 0.0, point.device_needed_bytes, 0
        rate = point.tokens_per_second_per_gpu
        # Three digits: what differs less is no reason for one more option.
        speed = 0.0 if rate is None else -float(f"{rate:.3g}")
        return False, speed, len(configuration.options) + len(configuration.stack), point.device_needed_bytes

    def _case(self, configuration: Configuration, length: int) -> Case:
        q = self.question
        return Case(
            method=self.method,
            options=configuration.options,
            model=q.model,
            architecture=q.architecture,
            seq_len=length,
            batch_size=q.batch_size,
            world_size=self.world,
            nodes=self.nodes,
            dtype=q.dtype,
            stack=STACKS[_STACK].model_copy(update=configuration.stack),
            mode="estimate",
            device="cuda",
            hardware=q.hardware,
            host_memory_bytes=q.host_memory_bytes,
        )

    def _point(self, configuration: Configuration, length: int) -> Search[Point]:
        estimate = yield self._case(configuration, length)
        if estimate.record is None:
            raise _FailedError(estimate.reason or "", failed=estimate.failed)
        record = estimate.record
        if record.status not in ("ok", "oom_device", "oom_host"):
            raise _FailedError(f"{record.status}: {record.reason}", failed=True)
        return Point(
            seq_len=length,
            status=record.status,
            reason=record.reason,
            peak_bytes=record.peak_allocated_bytes or 0,
            device_needed_bytes=record.device_needed_bytes or 0,
            host_needed_bytes=record.host_needed_bytes or 0,
            step_seconds=record.step_seconds,
            tokens_per_second_per_gpu=record.tokens_per_second_per_gpu,
            mfu=record.mfu,
            uncertainty=None if record.modelled is None else record.modelled.uncertainty,
        )


def _ended(problem: _FailedError | None) -> End:
    """Why a method has no context at all."""
    if problem is not None and problem.failed:
        return "estimate failed"
    return "divisibility" if problem is not None and _DIVIDES.search(str(problem)) else "cannot run"


def _told(answer: MethodPlan) -> str:
    where = f"{answer.method} on {answer.world_size}"
    if answer.longest is None:
        return f"{where}: nothing fits ({answer.ended_by})"
    return f"{where}: {format_length(answer.longest.seq_len)}, then {answer.ended_by}"
