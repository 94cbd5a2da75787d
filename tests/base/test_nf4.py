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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(96, 200), (3, 34), (7, 64), (130,), (5, 33), (33, 1030)], ids=str)
@DOUBLE
@TYPES
def test_any_shape_and_dtype_dequantizes_into_a_buffer_as_in_bitsandbytes(quant_type, double_quant, shape, dtype):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    codes, state = bnb.quantize_4bit(value, compress_statistics=double_quant, quant_type=quant_type)
    stored, buffer = nf4.quantize(value, quant_type, double_quant), torch.full(shape, torch.nan, dtype=dtype)
    assert nf4.dequantize(stored, shape, quant_type, dtype, out=buffer) is buffer
    assert torch.equal(buffer, bnb.dequantize_4bit(codes, state).view(shape))


@pytest.mark.parametrize("block", [32, 128, 4096])
def test_blocks_of_other_checkpoints_are_dequantized(block):
    codes, state = bnb.quantize_4bit(weight(), blocksize=block, quant_type="nf4")
    ours = nf4.dequantize({"codes": codes, "absmax": state.absmax}, (96, 200), "nf4", torch.bfloat16, block=block)
    assert torch.equal(ours, bnb.dequantize_4bit(codes, state))


def test_a_buffer_with_gaps_is_refused():
    stored, gaps = nf4.quantize(weight(), "nf4", True), torch.empty(96, 400, dtype=torch.bfloat16)[:, ::2]
    with pytest.raises(ValueError, match="contiguous"):
        nf4.dequantize(stored, (96, 200), "nf4", torch.bfloat16, out=gaps)


@DOUBLE
def test_stored_shapes_are_as_announced(double_quant):
    stored = nf4.quantize(weight(), "nf4", double_quant)
    announced = nf4.state_shapes(96 * 200, double_quant)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == announced


def test_double_quantization_takes_4_127_bits_per_weight():
    shapes = nf4.state_shapes(4096 * 4096, True)
    total = sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in shapes.values())
    assert round(8 * total / 4096**2, 3) == 4.127
