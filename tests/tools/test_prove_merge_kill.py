"""A merge that is killed leaves nothing or the whole, and the rerun gives the same bytes."""

from __future__ import annotations

import pytest

from tools.prove_merge_kill import prove


@pytest.mark.slow
def test_three_kills_leave_nothing_half_done(tmp_path):
    found = prove(tmp_path, kills=3, layers=3)
    assert found["kills"] == 3
    assert found["completed"] >= 1
    assert (found["left_a_broken_folder"], found["other"], found["left_beside"]) == (0, 0, [])
