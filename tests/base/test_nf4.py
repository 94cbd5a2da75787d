"""Stored tensors are bitsandbytes' own, bit for bit."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_kit.base import nf4

DOUBLE = pytest.mark.parametrize("double_quant", [True, False])
TYPES = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])


def weight(rows: int = 96, columns: int = 200) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).bfloat16() * 0.02


@DOUBLE
@TYPES
def test_dequantized_weight_is_bit_identical_to_bitsandbytes(quant_type, double_quant):
    codes, state = bnb.quantize_4bit(weight(), compress_statistics=double_quant, quant_type=quant_type)
    stored = nf4.quantize(weight(), quant_type, double_quant)
    assert torch.equal(stored["codes"], codes)
    assert torch.equal(nf4.dequantize(stored, (96, 200), quant_type, torch.bfloat16), bnb.dequantize_4bit(codes, state))


@DOUBLE
def test_stored_shapes_are_as_announced(double_quant):
    stored = nf4.quantize(weight(), "nf4", double_quant)
    announced = nf4.state_shapes(96 * 200, double_quant)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == announced


def test_double_quantization_takes_4_127_bits_per_weight():
    shapes = nf4.state_shapes(4096 * 4096, True)
    total = sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in shapes.values())
    assert round(8 * total / 4096**2, 3) == 4.127
