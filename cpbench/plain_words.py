"""What is wrong with a file that people write, in their words: the key, what is allowed, the nearest valid name."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from cpbench.errors import nearest

_QUOTED = re.compile(r"'([^']*)'")
_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "string": "a text",
    "dict": "a table",
    "model": "a table",
    "tuple": "a list",
    "list": "a list",
}
_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def problems_of(error: ValidationError, model: type[BaseModel], hidden: Sequence[str] = ()) -> list[str]:
    """Return every problem that pydantic found, one sentence for each key.

    Args:
        error: of validating a file's contents.
        model: what the file should be.
        hidden: fields of `model` that a file may not have.
    """
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    sentences: list[str] = []
    for problem in error.errors():
        where, inside = _place(problem["loc"], model)
        if problem["type"] == "extra_forbidden":
            known = [
                name for name in sorted(inside) if inside is not model.model_fields or name not in hidden
            ]
            near = nearest(str(problem["loc"][-1]), known)
            hint = f"; did you mean {near!r}?" if near else "."
            sentences.append(f"unknown key {where!r}{hint} Allowed here: {', '.join(known)}")
        else:
            grouped.setdefault(where, []).append(problem)
    return sentences + [_sentence(where, problems) for where, problems in grouped.items()]


def _sentence(where: str, problems: Sequence[Mapping[str, Any]]) -> str:
    """All problems of one key: what would be allowed instead, of every type that it may have."""
    given = problems[0].get("input")
    shown = "" if isinstance(given, dict) or problems[0]["type"] == "missing" else f" (given: {given!r})"
    if any(problem["type"] == "missing" for problem in problems):
        return f"{where} is missing"
    told = [p["msg"].removeprefix("Value error, ") for p in problems if p["type"] == "value_error"]
    if told:
        return f"{where}: {told[0]}{shown}" if where else f"{told[0]}{shown}"
    names = [name for p in problems if p["type"] == "literal_error" for name in _names(p)]
    allowed = [kind for p in problems if (kind := _allowed(p))]
    allowed += (
        [", ".join(map(repr, names[:-1])) + " or " * (len(names) > 1) + repr(names[-1])] if names else []
    )
    if not allowed:
        return f"{where}: {problems[0]['msg']}{shown}"
    near = nearest(given, names) if isinstance(given, str) else None
    hint = f"; did you mean {near!r}?" if near else ""
    return f"{where} must be {' or '.join(dict.fromkeys(allowed))}{shown}{hint}"


def _names(problem: Mapping[str, Any]) -> list[str]:
    return _QUOTED.findall(str(problem.get("ctx", {}).get("expected", "")))


def _allowed(problem: Mapping[str, Any]) -> str | None:
    kind = str(problem["type"])
    if kind in _LIMITS:
        words, key = _LIMITS[kind]
        return f"{words} {problem['ctx'][key]}"
    if kind == "too_short":
        return "a list that is not empty"
    return _KINDS.get(kind.partition("_")[0]) if kind.endswith(("_type", "_parsing", "_from_float")) else None


def _place(location: Sequence[str | int], model: type[BaseModel]) -> tuple[str, Mapping[str, Any]]:
    """The key in the file's words, and the fields of the table that it is in.

    pydantic's location also names the branches of unions and the items of lists; both are left out.
    """
    words, fields = "", model.model_fields
    annotation: Any = model
    for part in location:
        annotation = _bare(annotation)
        origin = get_origin(annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            fields = annotation.model_fields
            words += f"{'.' if words and not words.endswith(' ') else ''}{part}"
            if str(part) not in fields:
                break
            annotation = fields[str(part)].annotation
        elif origin is dict:
            words += f".{part}"
            annotation = get_args(annotation)[1]
        elif origin is tuple and _is_table(get_args(annotation)[0]):
            words = f"[[{words}]] rule {int(part) + 1}: " if isinstance(part, int) else words
            annotation = get_args(annotation)[0]
        else:
            break
    return words.removesuffix(": "), fields


def _is_table(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _bare(annotation: Any) -> Any:  # noqa: ANN401 - what a type annotation may be
    """An annotation without metadata and without None."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, types.UnionType):
            rest = [arg for arg in get_args(annotation) if arg is not type(None)]
            if len(rest) != 1:
                return annotation
            annotation = rest[0]
        else:
            return annotation
