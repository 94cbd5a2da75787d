"""Bytes and seconds as people write and read them. Imports nothing heavy; imported by everyone who prints a number.

GiB is 2**30 and appears only in text: every figure in the code is an integer of bytes.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SUFFIXES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SUFFIXES |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Bytes of `"22.5GiB"`, `"800 MB"` or a plain integer.

    Raises: ValueError: not a size.
    """
    match = _SIZE.fullmatch(str(text))
    if match is None or match[2].lower() not in _SUFFIXES:
        raise ValueError(f"{text!r} is not a size; write it like 24GiB, 800MiB or 12.5GB")
    count = int(Fraction(match[1]) * _SUFFIXES[match[2].lower()])  # exact: a float would round large integers
    if count >= 1 << 63:
        raise ValueError(f"{str(text)[:40]!r} is more bytes than any file or memory has")
    return count


def format_bytes(count: float) -> str:
    """`12.3 GiB`, `4.0 MiB`, `512 B`."""
    for suffix, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.1f} {suffix}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """`8.2 s`, `3 min 05 s`, `2 h 14 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
