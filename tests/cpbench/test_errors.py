"""The error tree: what the user can mend, and names that offer the nearest one."""

from __future__ import annotations

import inspect

import pytest

from cpbench import errors
from cpbench.errors import CpbenchError, UnknownName, nearest


def test_every_error_is_the_users_problem() -> None:
    """Each class of the module descends from CpbenchError and stands in the drawn tree."""
    classes = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    ]
    assert len(classes) > 5
    for each in classes:
        assert issubclass(each, CpbenchError)
        assert each.__name__ in str(errors.__doc__)


def test_a_name_that_begins_so_is_nearer() -> None:
    """A shortened name finds the name that begins with it; another word for a value finds the value."""
    assert nearest("h100", ["h200", "h100-80g", "h100-96g-nvl"]) == "h100-80g"
    assert nearest("gpu", ["cpu", "cuda"]) == "cuda"
    assert nearest("gpu", ["gpus_per_node"]) == "gpus_per_node"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("rng", "ring"), ("RING", "ring"), ("ulyses", "ulysses"), ("zzz", None), ("", None)],
)
def test_nearest_name(name: str, expected: str | None) -> None:
    """A slip of the keyboard finds its name; something else finds nothing."""
    assert nearest(name, ["ring", "ulysses", "upipe"]) == expected


def test_unknown_name_says_what_there_is() -> None:
    """The message has the given name, the nearest one and all known ones in order."""
    message = str(UnknownName("method", "rng", ["ulysses", "ring"]))
    assert message == "unknown method 'rng'; did you mean 'ring'? Known: ring, ulysses"
    assert str(UnknownName("method", "zzz", [])) == "unknown method 'zzz'. Known: (none)"
