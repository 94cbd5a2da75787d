"""4-bit storage of a weight as plain tensors, and the way back. The kernels are bitsandbytes'.

A weight of n values in blocks of 64 becomes (names as attributes of `FrozenLinear`):

    codes         uint8 [ceil(n / 2), 1]     two 4-bit codes a byte
    absmax        fp32 [n / 64]              the largest magnitude of each block, or with double quantization
    absmax        uint8 [n / 64]             its 8-bit code, and
    absmax_scale  fp32 [n / 64 / 256]        one scale for each 256 of these codes, and
    absmax_offset fp32 []                    their mean

Why no `bitsandbytes.nn.Linear4bit`: on CPUs with AVX512-BF16 one evaluation repacks its weight for good and later
training passes no gradient; and its `MatMul4Bit` keeps the weight on `ctx`, out of reach of recomputation
(bitsandbytes issue 2034). Source: Dettmers et al. 2023, arXiv:2305.14314, section 3. Imported by: linear, loader.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # weights that share one absmax
NESTED_BLOCK = 256  # absmax values that share one scale


@functools.cache
def _functional() -> Any:
    """bitsandbytes' functions, imported without its remark on an optional CPU kernel."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


@functools.cache
def _absmax_code(device: torch.device) -> Tensor:
    """The 256 values of the 8-bit code of `absmax`, fp32 [256]: one table per device, shared by all weights."""
    return _functional().create_dynamic_map().to(device)


def state_shapes(weights: int, double_quant: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each stored tensor of a weight of `weights` values."""
    blocks = -(-weights // BLOCK)
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
    codes, state = _functional().quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=double_quant, quant_type=quant_type
    )
    stored = {"codes": codes, "absmax": state.absmax}
    if double_quant:
        stored |= {"absmax_scale": state.state2.absmax, "absmax_offset": state.offset}
    return stored


def dequantize(stored: Mapping[str, Tensor], shape: tuple[int, ...], quant_type: str, dtype: torch.dtype) -> Tensor:
    """The weight, `shape` in `dtype`, from its stored tensors."""
    functional = _functional()
    absmax, nested, offset = stored["absmax"], None, stored.get("absmax_offset")
    if offset is not None:
        code = _absmax_code(absmax.device)
        nested = functional.QuantState(
            absmax=stored["absmax_scale"], code=code, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
    state = functional.QuantState(
        absmax=absmax,
        shape=shape,
        blocksize=BLOCK,
        quant_type=quant_type,
        dtype=dtype,
        offset=offset,
        state2=nested,
    )
    return functional.dequantize_4bit(stored["codes"], state)
