"""Conversions: what people write is read exactly, and what is shown reads back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.errors import UsageError
from cpbench.units import (
    MAX_LENGTH,
    format_bytes,
    format_length,
    format_rate,
    format_seconds,
    parse_bytes,
    parse_length,
)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("128K", 131072), ("5M", 5 * 1024 * 1024), ("4096", 4096), (" 2k ", 2048), ("2.5M", 2621440), (7, 7)],
)
def test_lengths_are_binary(text: str | int, tokens: int) -> None:
    """K is 1024 and M is 1024 x 1024 tokens; plain integers stay as they are."""
    assert parse_length(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "abc", "-1", "0", "0K", "1G", "1e3", "0.3", "1.00001K", "12K tokens", "nan", True]
)
def test_what_is_no_length_is_refused_with_its_value(text: str) -> None:
    """Zero, negatives, fractions of a token and words are refused, and the message repeats the value."""
    with pytest.raises(UsageError) as caught:
        parse_length(text)
    assert repr(text) in str(caught.value)


@given(st.integers(min_value=1, max_value=MAX_LENGTH))
def test_shown_lengths_read_back(tokens: int) -> None:
    """A length shown to the user is the same length when typed."""
    assert parse_length(format_length(tokens)) == tokens


@given(st.integers(min_value=1, max_value=2**40), st.sampled_from(["", "K", "k", "M", "m"]))
def test_suffixes_multiply_exactly(number: int, suffix: str) -> None:
    """Integers with a suffix are exact up to the longest length, without a detour through floats; longer is refused."""
    factor = {"": 1, "k": 2**10, "m": 2**20}[suffix.lower()]
    if number * factor <= MAX_LENGTH:
        assert parse_length(f"{number}{suffix}") == number * factor
    else:
        with pytest.raises(UsageError, match="more than 1024M tokens"):
            parse_length(f"{number}{suffix}")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80G", 80 * 2**30),
        ("80GiB", 80 * 2**30),
        ("512 MB", 512 * 2**20),
        ("2T", 2**41),
        ("10", 10),
        ("10B", 10),
    ],
)
def test_sizes_are_binary(text: str, size: int) -> None:
    """G, GB and GiB all mean 2**30 bytes."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1G", "0", "1P"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """A size must be a positive number with a known unit."""
    with pytest.raises(UsageError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (51.1 * 2**30, "51.1 GiB"),
        (2**40, "1.00 TiB"),
    ],
)
def test_bytes_for_people(size: float | None, text: str) -> None:
    """Three significant digits and a binary unit; a dash where there is no number."""
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.085, "85 ms"), (12.34, "12.3 s"), (245, "4 min 05 s"), (6660, "1 h 51 min")],
)
def test_durations_for_people(seconds: float | None, text: str) -> None:
    """Milliseconds to hours, each in the unit that a person would use."""
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(None, "-"), (0.5, "0.5"), (271.31, "271.3"), (123456.7, "123,457")]
)
def test_rates_for_people(rate: float | None, text: str) -> None:
    """About four digits, thousands separated."""
    assert format_rate(rate) == text
