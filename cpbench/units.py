"""Conversions between what people write (`128K`, `80 GiB`, `1.5 s`) and what is stored (tokens, bytes, seconds).

Lengths and byte counts are binary: `128K` is 131072 tokens, `5M` is 5 x 1024 x 1024.  Stored values are always
plain integers (tokens, bytes) or floats in SI base units; this module is the only place that converts.
"""

from __future__ import annotations

import re

from cpbench.errors import UsageError

KIB = 2**10
MIB = 2**20
GIB = 2**30
TIB = 2**40
MAX_LENGTH = 2**30
"""Tokens: 16 times the longest context that a plan searches for; more is a slip of the keyboard."""

_LENGTH = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KkMm]?)\s*$")
_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(?:([KMGTkmgt])(?:i?[Bb])?|[Bb])?\s*$")
_DIGITS = 40
_LENGTH_FACTOR = {"": 1, "k": KIB, "m": MIB}
_BYTE_FACTOR = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB}


def parse_length(text: str | int) -> int:
    """Return a sequence length in tokens.

    Args:
        text: an integer, or a number with suffix K (x 1024) or M (x 1024 x 1024), for example `128K`, `2.5M`.

    Raises:
        UsageError: not a number, not whole, zero or negative, or above `MAX_LENGTH`.
    """
    match = _LENGTH.match(str(text)) if not isinstance(text, bool) else None
    if match is None:
        raise UsageError(
            f"length {text!r} is not a positive number of tokens; write an integer or use K or M, like 131072, 128K, 5M"
        )
    if len(match[1]) > _DIGITS:
        raise UsageError(
            f"length {text!r:.40} is more than {format_length(MAX_LENGTH)} tokens, the longest allowed"
        )
    exact = float(match[1]) * _LENGTH_FACTOR[match[2].lower()] if "." in match[1] else None
    tokens = int(match[1]) * _LENGTH_FACTOR[match[2].lower()] if exact is None else round(exact)
    if exact is not None and exact != tokens:
        raise UsageError(f"length {text!r} is {exact} tokens; a length must be a whole number of tokens")
    if tokens <= 0:
        raise UsageError(f"length {text!r} must be at least 1 token")
    if tokens > MAX_LENGTH:
        raise UsageError(
            f"length {text!r} is more than {format_length(MAX_LENGTH)} tokens, the longest allowed"
        )
    return tokens


def parse_bytes(text: str | int) -> int:
    """Return a size in bytes from `2T`, `80GiB`, `512 MB` (all binary) or a plain number of bytes.

    Raises:
        UsageError: not a size, or not positive.
    """
    match = _BYTES.match(str(text)) if not isinstance(text, bool) else None
    if match is None:
        raise UsageError(
            f"size {text!r} is not a number of bytes; write it like 80G, 512MiB, 2T or 1073741824"
        )
    size = round(float(match[1]) * _BYTE_FACTOR[(match[2] or "").lower()])
    if size <= 0:
        raise UsageError(f"size {text!r} must be positive")
    return size


def format_length(tokens: int) -> str:
    """Return `131072` as `128K` and `5242880` as `5M`; lengths that are no multiple stay integers.

    The result always parses back to the same number of tokens.
    """
    if tokens >= MIB and tokens % (MIB // 4) == 0:
        whole, quarters = divmod(tokens // (MIB // 4), 4)
        return f"{whole}{('', '.25', '.5', '.75')[quarters]}M"
    if tokens >= KIB and tokens % KIB == 0:
        return f"{tokens // KIB}K"
    return str(tokens)


def format_bytes(size: float | None) -> str:
    """Return a size with three significant digits and a binary unit, for example `51.1 GiB`; None gives `-`."""
    if size is None:
        return "-"
    magnitude = abs(size)
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if magnitude >= factor:
            value = size / factor
            digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
            return f"{value:.{digits}f} {unit}"
    return f"{size:.0f} B"


def format_seconds(seconds: float | None) -> str:
    """Return a duration for people: `85 ms`, `12.3 s`, `4 min 05 s`, `1 h 51 min`; None gives `-`."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_error(part: float | None) -> str:
    """Return a signed relative error in percent, for example `+0.31%`; None gives `-`."""
    return "-" if part is None else f"{part:+.2%}"


def format_rate(per_second: float | None) -> str:
    """Return a rate with a thousands separator and about four significant digits; None gives `-`."""
    if per_second is None:
        return "-"
    if per_second >= 1000:
        return f"{per_second:,.0f}"
    return f"{per_second:.4g}"
