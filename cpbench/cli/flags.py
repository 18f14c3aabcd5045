"""Reads the values of flags: lists with commas, counts, choices, `method.field=value`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from cpbench import registry
from cpbench.case import STACKS, Dtype, OptionValue, Stack
from cpbench.errors import UnknownName, UsageError
from cpbench.units import parse_length


def split(flag: str, values: Sequence[str] | None) -> list[str]:
    """Return the items of a repeated flag whose values may be lists with commas; none if it is not given.

    Raises:
        UsageError: it is given without a value, as by an unset variable of a shell.
    """
    found: list[str] = []
    for value in values or ():
        items = [item.strip() for item in value.split(",") if item.strip()]
        if not items:
            raise UsageError(
                f"{flag} {value!r} has no value; give one, or leave the flag out for its default"
            )
        found += items
    return found


def methods(values: Sequence[str] | None, plugins: Sequence[Path]) -> list[str]:
    """Return the methods of --method; `all` stands for every built-in one and those of plug-ins.

    Raises:
        UsageError: it is empty, or a plug-in is no method's file.
    """
    names = split("--method", values)
    return list(registry.method_files(plugins)) if "all" in names else names


def lengths(flag: str, values: Sequence[str] | None) -> list[int]:
    """Return sequence lengths in tokens.

    Raises:
        UsageError: one is not a positive length, or `flag` is empty.
    """
    return [parse_length(item) for item in split(flag, values)]


def counts(flag: str, values: Sequence[str] | None) -> list[int]:
    """Return positive integers.

    Raises:
        UsageError: one is not, naming `flag`.
    """
    found = []
    for item in split(flag, values):
        if not item.isdecimal() or int(item) < 1:
            raise UsageError(f"{flag} {item!r} is not a whole number from 1 up")
        found.append(int(item))
    return found


def choice(flag: str, value: str | None, allowed: Iterable[str]) -> str | None:
    """Return `value` if it is allowed or None.

    Raises:
        UnknownName: it is not, with the nearest allowed one.
    """
    known = list(allowed)
    if value is not None and value not in known:
        raise UnknownName(f"value of {flag}", value, known)
    return value


def axes(
    *,
    method: Sequence[str] | None,
    model: Sequence[str] | None,
    seqlen: Sequence[str] | None,
    world: Sequence[str] | None,
    batch: Sequence[str] | None,
    dtype: Sequence[str] | None,
    stack: Sequence[str] | None,
    plugins: Sequence[Path],
) -> dict[str, list[Any]]:
    """Return the axes of a scenario's `[sweep]` that are given by flags: their names there, and values.

    Args:
        method: texts of --method; each of these may be a list with commas, or None where the flag is not given.
        model: of --model.
        seqlen: of --seqlen.
        world: of --world.
        batch: of --batch.
        dtype: of --dtype.
        stack: of --stack.
        plugins: files of further methods, which `--method all` has too.

    Raises:
        UsageError: a flag is empty or malformed.
        UnknownName: a dtype or stack that does not exist.
    """
    found: dict[str, list[Any]] = {
        "method": methods(method, plugins),
        "model": split("--model", model),
        "seq_len": lengths("--seqlen", seqlen),
        "world_size": counts("--world", world),
        "batch_size": counts("--batch", batch),
        "dtype": [choice("--dtype", item, get_args(Dtype)) for item in split("--dtype", dtype)],
        "stack": [choice("--stack", item, STACKS) for item in split("--stack", stack)],
    }
    return {name: values for name, values in found.items() if values}


def option_sets(values: Sequence[str] | None) -> dict[str, dict[str, list[OptionValue]]]:
    """Return method options by method and field; several values of a field are an axis of that method.

    Args:
        values: texts like `upipe.stage_heads=8` or `upipe.stage_heads=8,16`.

    Raises:
        UsageError: a text has another form.
    """
    found: dict[str, dict[str, list[OptionValue]]] = {}
    for text in values or ():
        target, equals, value = text.partition("=")
        method, dot, field = target.strip().partition(".")
        items = [item.strip() for item in value.split(",")]
        if not (equals and dot and method and field and all(items)):
            raise UsageError(
                f"--option {text!r} is not of the form method.field=value, like upipe.stage_heads=8"
            )
        found.setdefault(method, {}).setdefault(field, []).extend(_value(item) for item in items)
    return found


def stack_changes(values: Sequence[str] | None) -> dict[str, OptionValue]:
    """Return changes to the stack by field.

    Args:
        values: texts like `optimizer_offload=true`.

    Raises:
        UsageError: a text has another form, a field is unknown, or is given twice.
    """
    found: dict[str, OptionValue] = {}
    for text in values or ():
        field, equals, value = (part.strip() for part in text.partition("="))
        if not (equals and field and value):
            raise UsageError(
                f"--stack-option {text!r} is not of the form FIELD=VALUE, like optimizer_offload=true"
            )
        if field not in Stack.model_fields:
            raise UnknownName("stack option", field, Stack.model_fields)
        if field in found:
            raise UsageError(f"--stack-option {field} is given twice; a stack has one value of each option")
        found[field] = _value(value)
    return found


def _value(text: str) -> OptionValue:
    """A bool, int or float where it reads as one, else the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) else text
