"""The grid that plans are held to covers what it says, and its two ways of measuring agree with the plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_kit.architectures import ARCHITECTURES, PLANNED_ONLY
from qlora_kit.planning.shapes import read_config
from tools.prove_grid import HALVES, MEASURES, grid

TIMES = 3  # that each value of a switch occurs at least


@pytest.mark.parametrize("half", HALVES)
def test_every_architecture_that_is_trained_is_in_the_grid(half: str) -> None:
    found = {read_config(point.model)[0]["model_type"] for point in grid(half)}
    assert found >= set(ARCHITECTURES) - set(PLANNED_ONLY)


@pytest.mark.parametrize("half", HALVES)
def test_every_value_of_every_switch_meets_several_models(half: str) -> None:
    points = grid(half)
    for key, values in HALVES[half].items():
        count = Counter(point.values[key] for point in points)
        assert set(count) == set(values)
        assert min(count.values()) >= TIMES


def test_the_grid_has_sixty_points_and_is_always_the_same() -> None:
    points = [point for half in HALVES for point in grid(half)]
    assert len(points) >= 60
    assert points == [point for half in HALVES for point in grid(half)]


@pytest.mark.parametrize("half", HALVES)
def test_a_point_is_within_3_percent(half: str, tmp_path: Path) -> None:
    point = next(point for point in grid(half) if point.model.startswith("smollm2"))
    small = replace(point, layers=2, values=point.values | {"data.seq_len": 128})
    assert MEASURES[half](small, tmp_path).error == pytest.approx(0, abs=0.03)
