"""The grid covers what it says, and a point of either half is measured as it was planned."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from qlora_kit.architectures import ARCHITECTURES
from tools.prove_grid import HALVES, MEASURES, MODELS, SWITCHES, beside, grid
from tools.random_base import shape_config

halves = pytest.mark.parametrize("half", HALVES)


@halves
def test_every_architecture_is_there(half):
    assert {shape_config(model, None)[0]["model_type"] for model, _ in MODELS[half][0]} == set(ARCHITECTURES)


@halves
def test_every_model_is_there_as_often_as_said(half):
    models, rounds = MODELS[half]
    assert Counter((point.model, point.layers) for point in grid(half)) == dict.fromkeys(models, rounds)


@halves
def test_every_value_of_every_switch_is_there_three_times(half):
    points, switches = grid(half), HALVES[half]
    assert switches.keys() >= SWITCHES.keys()
    for key, values in switches.items():
        found = Counter(repr(point.values[key]) for point in points)  # by repr: True == 1
        assert found.keys() == set(map(repr, values)), key
        assert min(found.values()) >= 3, key


@halves
def test_the_points_are_always_the_same(half):
    random.seed(0)
    once = grid(half)
    random.seed(1)
    assert grid(half) == once


@halves
def test_a_small_point_is_measured_as_planned(half, tmp_path):
    first = grid(half)[0]
    small = replace(first, model="smollm2-135m", layers=2, values=first.values | {"data.seq_len": 128})
    point = MEASURES[half](small, tmp_path)
    assert min(point.planned["activations"], point.measured["activations"]) > 0
    assert abs(point.error) <= 0.03


@halves
@pytest.mark.parametrize("number", [0, 1], ids=["whole", "branches"])
def test_what_is_trained_beside_the_linears_is_measured_as_planned(half, number, tmp_path):
    asked = beside(half)[number]
    small = replace(asked, model="smollm2-135m", layers=2, values=asked.values | {"data.seq_len": 128})
    point = MEASURES[half](small, tmp_path)
    assert min(point.planned["optimizer"], point.measured["optimizer"]) > 0
    assert abs(point.error) <= 0.03
