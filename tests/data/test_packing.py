"""Claims about packing, on lengths alone."""

from __future__ import annotations

import random
import time

import pytest

from qlora_kit.data.packing import pack


def drawn_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(1, longest) for _ in range(count)]


@pytest.mark.parametrize(("count", "longest", "seq_len"), [(1, 5, 5), (50, 8, 8), (700, 300, 512), (99, 1, 7)])
def test_every_index_once_and_no_row_longer_than_seq_len(count: int, longest: int, seq_len: int) -> None:
    lengths = drawn_lengths(count, longest)
    rows = pack(lengths, seq_len)
    assert sorted(index for row in rows for index in row) == list(range(count))
    assert max(sum(lengths[index] for index in row) for row in rows) <= seq_len


def test_each_document_goes_into_the_fullest_row_that_takes_it() -> None:
    #                    0  1  2  3  4
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack([7, 6, 3], 10) == [[0, 2], [1]]


def test_equal_lengths_are_taken_in_their_order() -> None:
    assert pack([2, 2, 2, 2], 4) == [[0, 1], [2, 3]]


def test_short_documents_fill_rows_to_more_than_99_percent() -> None:
    lengths = drawn_lengths(5000, 200)
    rows = pack(lengths, 1024)
    assert sum(lengths) / (1024 * len(rows)) > 0.99


def test_a_hundred_thousand_documents_pack_in_seconds_not_hours() -> None:
    lengths = drawn_lengths(100_000, 2048)
    start = time.process_time()
    pack(lengths, 2048)
    assert time.process_time() - start < 20  # measured 0.4 s; comparing all pairs would take half an hour


@pytest.mark.parametrize("length", [0, -1, 11])
def test_a_length_that_no_row_takes_is_a_bug_of_the_caller(length: int) -> None:
    with pytest.raises(ValueError, match=f"example 1 has {length} tokens"):
        pack([3, length], 10)


def test_nothing_packs_to_nothing() -> None:
    assert pack([], 10) == []
