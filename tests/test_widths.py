"""Few widths, none of them much too wide."""

from __future__ import annotations

import pytest

from qlora_kit.widths import few_sizes, padded_width, widths


def test_a_row_is_padded_to_one_of_few_widths_but_not_beyond_seq_len() -> None:
    assert [padded_width(longest, 100) for longest in (0, 1, 32, 33, 97, 100)] == [0, 32, 32, 64, 100, 100]
    assert [padded_width(longest, 4096) for longest in (128, 129, 256, 257, 1025)] == [128, 160, 256, 320, 1280]


def test_padding_is_a_quarter_at_most() -> None:
    assert all(count <= few_sizes(count) <= 1.25 * count for count in range(128, 4097))


@pytest.mark.parametrize("seq_len", [1, 32, 33, 100, 512, 2048])
def test_widths_are_counted(seq_len: int) -> None:
    assert widths(seq_len) == len({padded_width(longest, seq_len) for longest in range(1, seq_len + 1)})
