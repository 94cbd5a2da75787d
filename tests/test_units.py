"""Claims about sizes and times as people write and read them."""

from __future__ import annotations

import pytest

from qlora_kit.units import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * 2**30),
        ("22.5GiB", 45 * 2**29),
        ("800 MB", 800 * 10**6),
        (" 1 tib ", 2**40),
        ("512B", 512),
        ("7", 7),
        (7, 7),
        (2**53 + 1, 2**53 + 1),  # a float would lose the one
        ("0.1KiB", 102),  # whole bytes, rounded down
    ],
)
def test_sizes_are_read_as_they_are_written(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e3", "12 GiX", "1,5GiB", "1.GiB", "nan", "9" * 400 + "GiB"])
def test_what_is_not_a_size_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size; write it like 24GiB|is more bytes than"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (45 * 2**29, "22.5 GiB"), (-(2**20), "-1.0 MiB")],
)
def test_bytes_are_printed_in_the_largest_unit_that_they_fill(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize("count", [1, 1023, 5 * 2**20, 3 * 2**39, 2**60])
def test_printed_bytes_read_back_within_their_last_digit(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.24, "8.2 s"), (59.94, "59.9 s"), (59.97, "1 min 00 s"), (185, "3 min 05 s"), (8040, "2 h 14 min")],
)
def test_seconds_are_printed_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
