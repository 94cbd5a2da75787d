"""Rounding from fp64 is that of exact arithmetic, also where fp32 lies in the middle."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from qlora_kit.export.rounding import DROPPED_BITS, round_once


@pytest.mark.parametrize("dtype", DROPPED_BITS)
@pytest.mark.parametrize("side", [-1, 0, 1])
def test_a_value_beside_a_middle_goes_to_its_side(dtype, side):
    step = torch.finfo(dtype).eps
    middles = 1 + step * (torch.arange(100, dtype=torch.float64) + 0.5)
    exact = torch.cat([middles, -middles]) * (1 + side * 2.0**-40)
    for value, rounded in zip(exact.tolist(), round_once(exact, dtype).tolist()):
        error = abs(Fraction(rounded) - Fraction(value))
        assert error < Fraction(step) / 2 or side == 0
        if side == 0:
            assert error == Fraction(step) / 2
            assert (Fraction(rounded) / Fraction(step)) % 2 == 0


def test_torchs_own_rounding_is_wrong_there():
    exact = torch.tensor([1 + torch.finfo(torch.float16).eps / 2 + 2.0**-40], dtype=torch.float64)
    assert exact.half() != round_once(exact, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_elsewhere_it_is_torchs(dtype):
    exact = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = torch.cat([exact, exact * 1e-6, torch.tensor([0.0, 1e5, -1e39, float("nan")], dtype=torch.float64)])
    assert torch.allclose(round_once(exact, dtype), exact.to(dtype), rtol=0, atol=0, equal_nan=True)
