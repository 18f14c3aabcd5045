"""Finds methods by name: built-in files, `--plugin FILE` and the entry-point group `cpbench.methods`.

Listing imports nothing, so it is instant and needs no torch.  Loading imports one file; only the measured half does
that, so code of a plug-in never runs in the orchestrator.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

from cpbench.case import OptionValue
from cpbench.errors import CpbenchError, MethodUnavailable, UnknownName, UsageError, nearest
from cpbench.method import Method

_PACKAGE = "methods"  # the only place that names the package of built-in methods
_GROUP = "cpbench.methods"
_NAME = re.compile(r"^[a-z][a-z0-9_-]*$")


def method_files(plugins: Sequence[Path] = ()) -> dict[str, Path]:
    """Return the source file of every method by name; plug-ins come last and may not shadow a built-in.

    A file name's underscores read as dashes: `torch_ring.py` is the method `torch-ring`.

    Raises:
        UsageError: a plug-in file is missing, is no Python file, or has a name that is taken or not allowed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MethodUnavailable("the package of built-in methods is not installed; reinstall cpbench")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = {
        _method_name(path): path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")
    }
    files |= {name: path for name, path in _entry_points().items() if name not in files}
    for plugin in plugins:
        name = _method_name(plugin)
        if plugin.suffix != ".py" or not plugin.is_file():
            raise UsageError(f"plug-in {plugin} is not a Python file that exists; give the path of <name>.py")
        if not _NAME.match(name):
            raise UsageError(
                f"plug-in {plugin}: a method name is lower-case letters, digits, - and _, not {name!r}"
            )
        if name in files and files[name].resolve() != plugin.resolve():
            raise UsageError(f"plug-in {plugin}: the method name {name!r} is taken; rename the file")
        files[name] = plugin
    return files


def describe(path: Path) -> str:
    """Return the first line of a method file's docstring without running it."""
    try:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except (OSError, SyntaxError, ValueError) as error:
        return f"(cannot be read: {error})"
    return (docstring or "(no docstring)").splitlines()[0]


def require(name: str, plugins: Sequence[Path] = ()) -> Path:
    """Return the file of a method.

    Raises:
        UnknownName: there is none, with the nearest name.
    """
    files = method_files(plugins)
    if name not in files:
        raise UnknownName("method", name, files)
    return files[name]


def source_hash(path: Path) -> str:
    """Return 12 hex digits of the SHA-256 of a method's source, so that a stale record can be told."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def load(name: str, options: Mapping[str, OptionValue], plugins: Sequence[Path] = ()) -> Method:
    """Import a method's file and return the method with its options.

    Raises:
        UnknownName: no such method, or no such option.
        UsageError: an option has the wrong type or value.
        MethodUnavailable: the file cannot be imported or defines no METHOD.
    """
    path = require(name, plugins)
    module = _import(name, path)
    factory = getattr(module, "METHOD", None)
    if not (isinstance(factory, type) and dataclasses.is_dataclass(factory)):
        raise MethodUnavailable(f"method {name!r}: {path.name} must set METHOD to its options dataclass")
    fields = {field.name: field for field in dataclasses.fields(factory)}
    for key, value in options.items():
        if key not in fields:
            near = nearest(key, fields)
            hint = f"; did you mean {near!r}?" if near else "."
            raise UsageError(
                f"{name} has no option {key!r}{hint} It has: {', '.join(sorted(fields)) or '(none)'}"
            )
        default = fields[key].default
        if type(default) in (bool, int, float, str) and not _compatible(value, type(default)):
            raise UsageError(
                f"option {name}.{key} must be {type(default).__name__}, not {value!r} (default: {default!r})"
            )
    try:
        return cast(Method, factory(**options))
    except CpbenchError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {error}") from error


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """An option of a method, as its file says."""

    name: str
    default: str
    """As it is written in a command: `true`, `8`, `auto`."""
    doc: str
    """Its docstring in one line; empty if it has none."""


def options_of(path: Path) -> tuple[Option, ...]:
    """Return the options of a method without running its file: the fields of the class that METHOD names.

    A file that cannot be read, or without such a class, has none: loading it says what is wrong.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ()
    named = {
        node.value.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Name)
        and any(isinstance(target, ast.Name) and target.id == "METHOD" for target in node.targets)
    }
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in named]
    body = classes[0].body if classes else []
    found = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            doc = (
                after.value.value
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                else ""
            )
            found.append(Option(node.target.id, _written(node.value), " ".join(str(doc).split())))
    return tuple(found)


def _written(value: ast.expr | None) -> str:
    """A default as a command would say it."""
    if not isinstance(value, ast.Constant):
        return "" if value is None else ast.unparse(value)
    return str(value.value).lower() if isinstance(value.value, bool) else str(value.value)


def verify_options(path: Path) -> tuple[dict[str, OptionValue], ...]:
    """Return the option sets to verify: the defaults, then those that a method's file declares as VERIFY_OPTIONS.

    Raises:
        UsageError: see `declared_options`.
    """
    return declared_options(path, "VERIFY_OPTIONS")


def plan_options(path: Path) -> tuple[dict[str, OptionValue], ...]:
    """Return the option sets worth trying for a longer or faster context: the defaults, then PLAN_OPTIONS.

    Raises:
        UsageError: see `declared_options`.
    """
    return declared_options(path, "PLAN_OPTIONS")


def declared_options(path: Path, name: str) -> tuple[dict[str, OptionValue], ...]:
    """Return the defaults, then the option sets that a method's file declares under a name.

    A file declares them with a literal at its top level, read without running it:

        VERIFY_OPTIONS = ({"stage_heads": 8}, {"ring_degree": 2, "stage_heads": 4})

    A set that a shape or a number of ranks does not allow is unsupported there and does no harm.

    Raises:
        UsageError: the value is no literal tuple or list of mappings from option names to values.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ({},)  # loading the method says what is wrong with it
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if not any(isinstance(target, ast.Name) and target.id == name for target in targets):
            continue
        try:
            declared = ast.literal_eval(node.value)  # type: ignore[attr-defined]  # both kinds of assignment have one
            return ({}, *(dict(options) for options in declared))
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"{path.name}: {name} must be a literal tuple of option sets, like ({{'stage_heads': 8}},)"
            ) from error
    return ({},)


def resolved_options(method: Method) -> dict[str, OptionValue]:
    """Return every option of a loaded method with its value."""
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]


def _compatible(value: OptionValue, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def _method_name(path: Path) -> str:
    return path.stem.replace("_", "-")


def _entry_points() -> dict[str, Path]:
    """Files of third-party methods, located without importing them."""
    found: dict[str, Path] = {}
    for point in importlib.metadata.entry_points(group=_GROUP):
        # find_spec on a dotted name imports its parents: a third party's package, but not its method.
        spec = importlib.util.find_spec(point.module)
        if spec is not None and spec.origin:
            found[point.name] = Path(spec.origin)
    return found


def _import(name: str, path: Path) -> ModuleType:
    spec = importlib.util.find_spec(_PACKAGE)
    folder = Path(next(iter(spec.submodule_search_locations or ()))) if spec else None
    try:
        if folder is not None and path.parent == folder:
            return importlib.import_module(f"{_PACKAGE}.{path.stem}")
        return _import_file(f"cpbench_plugin_{name.replace('-', '_')}", path)
    except CpbenchError:
        raise
    except ImportError as error:
        raise MethodUnavailable(f"method {name!r} cannot be imported from {path.name}: {error}") from error
    except Exception as error:
        raise MethodUnavailable(f"method {name!r}: {path.name} fails on import: {error!r}") from error


def _import_file(module_name: str, path: Path) -> ModuleType:
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
