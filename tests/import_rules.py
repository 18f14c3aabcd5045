"""The import rules that keep cpbench in two halves, checked on the source without running it.

    nouns         what both halves speak of; import only one another
    orchestrator  the command line, the sweep, the report: no torch, so it starts at once and works on a laptop
    measured      what runs in the measured processes: torch, but no tables, plots or command line
    methods       plug-ins: the seam and the runtime, and never one another

Every check takes a mapping from module names to sources and returns what it finds wrong, in words.
"""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

# A new file belongs in exactly one of these; a name that ends in `.*` stands for a package and all that is in it.
NOUNS = """
    cpbench errors units case scenario record rank_report aggregate machine hardware host_budget method registry
    model_config hugging_face verification progress_file selection shape block_schedule explanation context_plan
    durations plain_words rate_probe kernel_finding
"""
ORCHESTRATOR = """
    __main__ cli.* report.* bracket disk doctor estimate_pool estimates expand explain folders gpu_checks gpu_findings
    interrupt launch mode outcome plan planned_run progress provenance published recommendation run_folder slurm summary
    supervise sweep text_table verify
"""
MEASURED = """
    worker verify_worker explain_worker estimate_server plan_worker resolve probe parity.* block_count block_log
    block_names block_recorder train optimizer world.* model.* memory.* timing.* runtime.*
"""

TORCH = frozenset({"torch"})
ORCHESTRATOR_LIBRARIES = frozenset({"pandas", "pyarrow", "matplotlib", "plotly", "jinja2", "typer", "rich"})
MAY_IMPORT = {
    "nouns": {"nouns"},
    "orchestrator": {"orchestrator", "nouns"},
    "measured": {"measured", "nouns"},
}
METHODS_MAY_IMPORT = (
    "cpbench.method",
    "cpbench.case",
    "cpbench.errors",
    "cpbench.model_config",
    "cpbench.runtime",
)

Sources = Mapping[str, str]


class Import(NamedTuple):
    """One import statement, resolved to the module that it runs."""

    target: str
    lazy: bool
    """Inside a function, so it runs when the function does."""


def read_sources(root: Path) -> dict[str, str]:
    """Sources of the project by module name."""
    sources = {}
    for package in ("cpbench", "methods"):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            sources[name] = path.read_text(encoding="utf-8")
    return sources


def imports_of(name: str, sources: Sources) -> list[Import]:
    """Every import of a module, those for the type checker excepted."""
    found = []
    for module, member, lazy in _statements(sources[name]):
        assert module is not None, f"{name}: write imports with their full name, not with dots"
        submodule = f"{module}.{member}"
        found.append(Import(submodule if submodule in sources else module, lazy))
    return list(dict.fromkeys(found))


@cache
def _statements(source: str) -> tuple[tuple[str | None, str, bool], ...]:
    """(module, member, inside a function) of every import statement; the module of a relative one is None."""

    def walk(nodes: Iterable[ast.AST], lazy: bool) -> Iterator[tuple[str | None, str, bool]]:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from walk(node.orelse, lazy)
            elif isinstance(node, ast.Import):
                yield from ((alias.name, "", lazy) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = None if node.level else node.module
                yield from ((module, alias.name, lazy) for alias in node.names)
            else:
                inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(ast.iter_child_nodes(node), lazy or inside)

    return tuple(walk([ast.parse(source)], False))


def half_of(name: str) -> str | None:
    """The class of a module, or None when it has none."""
    for half, text in (("nouns", NOUNS), ("orchestrator", ORCHESTRATOR), ("measured", MEASURED)):
        for entry in text.split():
            full = entry if entry == "cpbench" else f"cpbench.{entry}"
            package = full.removesuffix(".*")
            if name == full or (full != package and (name == package or name.startswith(f"{package}."))):
                return half
    return None


def unclassified(sources: Sources) -> list[str]:
    """Modules without a class."""
    return [
        f"{name} has no class: add it to NOUNS, ORCHESTRATOR or MEASURED in tests/import_rules.py"
        for name in sources
        if name.split(".")[0] == "cpbench" and half_of(name) is None
    ]


def wrong_directions(sources: Sources) -> list[str]:
    """Imports from one half into the other, or from a noun into either."""
    found = []
    for name in sources:
        half = half_of(name)
        for target, _ in imports_of(name, sources) if half else ():
            other = half_of(target)
            if other is not None and other not in MAY_IMPORT[str(half)]:
                found.append(f"{name} ({half}) imports {target} ({other})")
    return found


def chains_to(libraries: frozenset[str], halves: set[str], sources: Sources) -> list[str]:
    """The shortest chains of imports from each module of some halves to a library, lazy imports included."""
    found = []
    for start in sources:
        if half_of(start) not in halves:
            continue
        queue, seen = deque([[start]]), {start}
        while queue:
            chain = queue.popleft()
            for target, _ in imports_of(chain[-1], sources):
                if target.split(".")[0] in libraries:
                    found.append(" -> ".join([*chain, target]))
                for module in sorted({target, *_parents(target)} & sources.keys() - seen):
                    seen.add(module)
                    queue.append([*chain, module])
    return found


def _parents(name: str) -> list[str]:
    """Importing a module runs the packages around it first."""
    return [name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)]


def forbidden_in_methods(sources: Sources) -> list[str]:
    """What a method file may not import."""
    found = []
    for name in sources:
        if not name.startswith("methods."):
            continue
        for target, _ in imports_of(name, sources):
            allowed = any(target == entry or target.startswith(f"{entry}.") for entry in METHODS_MAY_IMPORT)
            ours = target.split(".")[0] in ("cpbench", "methods")
            if (ours and not allowed) or target.split(".")[0] in ORCHESTRATOR_LIBRARIES:
                found.append(f"{name} imports {target}")
    return found


def names_methods(sources: Sources) -> list[str]:
    """Modules of cpbench that name the package of methods, by an import or by a string an import could use."""
    # In `cpbench.cli.listing` the word is what a user types: `cpbench list methods`.
    strings_allowed = ("cpbench.registry", "cpbench.cli.listing")
    found = []
    for name, source in sources.items():
        if not name.startswith("cpbench"):
            continue
        if any(target.split(".")[0] == "methods" for target, _ in imports_of(name, sources)):
            found.append(f"{name} imports methods")
        texts = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
        if any(text == "methods" or str(text).startswith("methods.") for text in texts):
            found += [f"{name} names methods in a string"] if name not in strings_allowed else []
    return found


def cycles(sources: Sources) -> list[str]:
    """Import cycles; a package may reach down into itself inside a function, which is a facade."""
    edges = {
        name: [
            target
            for target, lazy in imports_of(name, sources)
            if target in sources and not (lazy and target.startswith(f"{name}."))
        ]
        for name in sources
    }
    found: list[str] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in edges[name]:
                visit(target, [*path, name])
            done.add(name)

    for name in sources:
        visit(name, [])
    return found
