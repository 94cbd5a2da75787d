"""Codes and block maxima are bitsandbytes' own, bit for bit, on weights made to tell rules apart."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_kit.base import quantize_cpu
from qlora_kit.base.quantize_cpu import BLOCK, PIECE, TILE, quantize_4bit

TYPES = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_equals_bitsandbytes(weight: torch.Tensor, quant_type: str) -> None:
    codes, absmax = quantize_4bit(weight, quant_type)
    expected, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type=quant_type)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax.isnan(), state.absmax.isnan())
    assert torch.equal(absmax.nan_to_num(-1.0), state.absmax.nan_to_num(-1.0))


def at_thresholds(quant_type: str) -> torch.Tensor:
    """Blocks of many magnitudes whose values lie on every threshold, and 1 and 2 units in the last place beside."""
    absmax = torch.cat([torch.ones(1), random(400).abs() * torch.logspace(-30, 30, 400), torch.tensor([1e-39, 3e38])])
    thresholds = torch.tensor([float(value) for value in quantize_cpu._levels(quant_type)[0]])
    centre = absmax[:, None] * thresholds
    around = [centre]
    for towards in (-torch.inf, torch.inf):
        near = centre
        for _ in range(2):
            near = torch.nextafter(near, torch.tensor(towards))
            around.append(near)
    values = torch.cat(around, dim=1)
    return torch.cat([absmax[:, None], values[:, : BLOCK - 1], absmax[:, None], values[:, BLOCK - 1 :]], dim=1)


HEAVY_TAILED = random(1 << 14).pow(7) * torch.logspace(-20, 5, 1 << 14)
WEIGHTS = {
    "normal": random(256, 512) * 0.02,
    "uniform": torch.rand(256, 512, generator=torch.Generator().manual_seed(1)) - 0.5,
    "heavy-tailed": HEAVY_TAILED,
    "few-values": random(1 << 14).mul(4).round().div(4),
    "zeros": torch.zeros(4 * BLOCK),
    "negative-zeros": -torch.zeros(4 * BLOCK),
    "subnormal": random(8 * BLOCK) * 1e-39,
    "near-overflow": random(8 * BLOCK).clamp(-1, 1) * 6e4,
}


@DTYPES
@TYPES
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_random_and_extreme_weights(weight, quant_type, dtype):
    assert_equals_bitsandbytes(weight.to(dtype), quant_type)


@TYPES
def test_values_at_the_thresholds_and_next_to_them(quant_type):
    values = at_thresholds(quant_type)
    assert_equals_bitsandbytes(values[:, : values.shape[1] // BLOCK * BLOCK].contiguous(), quant_type)


@TYPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_16_bit_type_under_many_maxima(dtype, quant_type):
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    values = patterns[patterns.isfinite() & (patterns.abs() <= 1)]
    for maximum in (1.0, 1.0078125, 1.1640625, 1.5, 1.9921875):
        blocks = torch.nn.functional.pad(values, (0, -len(values) % (BLOCK - 1))).view(-1, BLOCK - 1)
        weight = torch.cat([blocks, torch.full((len(blocks), 1), maximum, dtype=dtype)], dim=1)
        assert_equals_bitsandbytes(weight, quant_type)


@DTYPES
@TYPES
@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 65, 127, 1001, TILE - 64, TILE, TILE + 65, PIECE + TILE + 7])
def test_any_number_of_weights(size, quant_type, dtype):
    assert_equals_bitsandbytes(random(size).to(dtype), quant_type)


@TYPES
def test_a_last_block_of_zeros(quant_type):
    assert_equals_bitsandbytes(torch.cat([random(BLOCK), torch.zeros(7)]), quant_type)


@DTYPES
@TYPES
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [3, BLOCK + 1, 3 * BLOCK + 2])
def test_nan_and_infinity_spoil_their_block_only_as_in_bitsandbytes(position, special, quant_type, dtype):
    weight = random(3 * BLOCK + 5).to(dtype)
    weight[position] = special
    assert_equals_bitsandbytes(weight, quant_type)


@pytest.mark.parametrize("inference", [True, False])
def test_threads_change_no_bit(inference, monkeypatch):
    weight = random(7 * BLOCK * 33 + 3)
    monkeypatch.setattr(quantize_cpu, "TILE", 10 * BLOCK)
    monkeypatch.setattr(quantize_cpu, "WEIGHTS_PER_THREAD", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    with torch.inference_mode(inference):
        assert_equals_bitsandbytes(weight * 1.0, "nf4")


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="float64"):
        quantize_4bit(torch.zeros(64, dtype=torch.float64), "nf4")
