"""4-bit storage of a weight as plain tensors, and the way back. The kernels are bitsandbytes'.

A weight of n values in blocks of 64 becomes (names as attributes of `FrozenLinear`):

    codes         uint8 [ceil(n / 2), 1]     two 4-bit codes a byte
    absmax        fp32 [n / 64]              the largest magnitude of each block, or with double quantization
    absmax        uint8 [n / 64]             its 8-bit code, and
    absmax_scale  fp32 [n / 64 / 256]        one scale for each 256 of these codes, and
    absmax_offset fp32 []                    their mean
    absmax_code   fp32 [256]                 values of the 8-bit codes, only where not today's bitsandbytes'

Why no `bitsandbytes.nn.Linear4bit`: on CPUs with AVX512-BF16 one evaluation repacks its weight for good and later
training passes no gradient; and its `MatMul4Bit` keeps the weight on `ctx`, out of reach of recomputation
(bitsandbytes issue 2034). Source: Dettmers et al. 2023, arXiv:2305.14314, section 3. Imported by: linear, loader,
prequantized, export.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_kit.base import quantize_cpu
from qlora_kit.base.quantize_cpu import BLOCK

NESTED_BLOCK = 256  # absmax values that share one scale


@functools.cache
def bitsandbytes_functional() -> Any:
    """bitsandbytes' functions, imported without its remark on an optional CPU kernel."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


@functools.cache
def absmax_code(device: torch.device) -> Tensor:
    """The 256 values of the 8-bit code of `absmax`, fp32 [256]: one table per device, shared by all weights."""
    return bitsandbytes_functional().create_dynamic_map().to(device)


@functools.cache
def level_values(quant_type: str) -> Tensor:
    """The values of the 16 codes of a 4-bit type, for absmax 1, fp32 [16] on the host."""
    return bitsandbytes_functional().get_4bit_type(quant_type, device="cpu")


def state_shapes(
    weights: int, double_quant: bool, block: int = BLOCK
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each stored tensor of a weight of `weights` values, `block` of which share one absmax."""
    blocks = -(-weights // block)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": ((-(-weights // 2), 1), torch.uint8)}
    if not double_quant:
        return shapes | {"absmax": ((blocks,), torch.float32)}
    return shapes | {
        "absmax": ((blocks,), torch.uint8),
        "absmax_scale": ((-(-blocks // NESTED_BLOCK),), torch.float32),
        "absmax_offset": ((), torch.float32),
    }


def quantize(weight: Tensor, quant_type: str, double_quant: bool) -> dict[str, Tensor]:
    """The stored tensors of `weight` (any shape; bf16, fp16 or fp32), bit for bit as bitsandbytes computes them."""
    functional, weight = bitsandbytes_functional(), weight.contiguous()
    if weight.device.type == "cpu":
        codes, absmax = quantize_cpu.quantize_4bit(weight, quant_type)
    else:
        codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type=quant_type)
        absmax = state.absmax
    if not double_quant:
        return {"codes": codes, "absmax": absmax}
    offset = absmax.mean()
    code = absmax_code(absmax.device)
    absmax_codes, scale = torch.ops.bitsandbytes.quantize_blockwise(absmax - offset, code, NESTED_BLOCK)
    return {"codes": codes, "absmax": absmax_codes, "absmax_scale": scale, "absmax_offset": offset}


def dequantize(
    stored: Mapping[str, Tensor],
    shape: tuple[int, ...],
    quant_type: str,
    dtype: torch.dtype,
    *,
    block: int = BLOCK,
    out: Tensor | None = None,
) -> Tensor:
    """The weight, `shape` in `dtype`, from its stored tensors.

    Args:
        block: weights that share one absmax, in a checkpoint that somebody else made.
        out: contiguous, `shape` and `dtype`, to be overwritten and returned. On the CPU a large weight takes several
            times as long without it, most of it the kernel's zeroing of fresh pages.
    """
    codes, offset = stored["codes"], stored.get("absmax_offset")
    if quantize_cpu.has_kernels(codes):
        out = torch.empty(shape, dtype=dtype, device=codes.device) if out is None else out
        return quantize_cpu.dequantize_4bit(codes, dequantize_absmax(stored), quant_type, block, out)
    functional = bitsandbytes_functional()
    nested = None
    if offset is not None:
        nested = functional.QuantState(
            absmax=stored["absmax_scale"], code=_code(stored), blocksize=NESTED_BLOCK, dtype=torch.float32
        )
    state = functional.QuantState(
        absmax=stored["absmax"],
        shape=torch.Size(shape),
        blocksize=block,
        quant_type=quant_type,
        dtype=dtype,
        offset=offset,
        state2=nested,
    )
    return functional.dequantize_4bit(codes, state, out=out)


def dequantize_absmax(stored: Mapping[str, Tensor]) -> Tensor:
    """The largest magnitude of each block, fp32 [n / block], from the stored tensors; the codes are not used."""
    absmax, offset = stored["absmax"], stored.get("absmax_offset")
    if offset is None:
        return absmax
    scale, code = stored["absmax_scale"], _code(stored)
    if quantize_cpu.has_kernels(absmax):
        return quantize_cpu.dequantize_8bit(absmax, scale, code, NESTED_BLOCK).add_(offset)
    whole: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(absmax, scale, code, NESTED_BLOCK, torch.float32)
    return whole + offset


def _code(stored: Mapping[str, Tensor]) -> Tensor:
    code = stored.get("absmax_code")
    return absmax_code(stored["absmax"].device) if code is None else code
