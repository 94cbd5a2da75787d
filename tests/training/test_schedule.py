"""The learning rate's closed forms."""

from __future__ import annotations

import pytest

from qlora_kit.training.schedule import learning_rate


def rates(kind: str, total: int = 100, warmup: float = 0.1) -> list[float]:
    return [learning_rate(step, total=total, peak=1.0, warmup=warmup, kind=kind) for step in range(total)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_rises_to_the_peak_and_the_first_step_learns(kind):
    found = rates(kind)
    assert found[0] > 0
    assert found[:11] == sorted(found[:11])
    assert found[10] == 1.0


@pytest.mark.parametrize(("kind", "middle"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_half_way_after_warm_up(kind, middle):
    assert rates(kind)[55] == pytest.approx(middle)


def test_without_warm_up_the_first_step_has_the_peak():
    assert rates("cosine", warmup=0.0)[0] == 1.0
