"""4 bits on the CPU: quantization bit for bit as bitsandbytes' own and ten times faster, and its dequantize kernels.

Why: bitsandbytes has no CPU kernel for quantization. Its generic torch code finds the level of one weight after the
other by `bucketize`, on fp32 copies of the whole weight; that was most of the time it took to load a model. For
dequantization it has kernels, but no way to say where the result should go.
How: to be quantized, the weight passes through tiles of scratch that stay in the processor's cache. A block is scaled
by the same fp32 operations as in bitsandbytes; the level is the number of thresholds below the scaled value, by 15
comparisons. numpy makes these: its comparisons into bytes are SIMD code, torch's take ten times as long. Tiles are
large because threads must hand each other the interpreter's lock between two operations.
Source: the rule is bitsandbytes 0.50.2's, `backends/default/ops.py`, `quantize_4bit`. Imported by: nf4.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 64  # weights that share one absmax
TILE = 1 << 19  # weights; 6 bytes of scratch for each, in every thread
PIECE = 1 << 20  # weights whose maxima are taken at a time; 2 or 4 bytes of scratch for each
WEIGHTS_PER_THREAD = 1 << 21  # fewer are not worth a thread
TINY = 1e-38  # bitsandbytes' least divisor
LEVELS = 16
# For each dtype the integer of its size and the bits of the magnitude, whose order as integers is that of the values.
MAGNITUDE = {
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
    torch.float32: (torch.int32, 0x7FFF_FFFF),
}

Array = np.ndarray[Any, np.dtype[Any]]


@functools.cache
def _levels(quant_type: str) -> tuple[tuple[np.float32, ...], Array]:
    """The 15 thresholds between the levels, ascending, and for a byte of two levels the byte of their two codes."""
    from bitsandbytes.functional import get_4bit_type

    values = get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(values)
    thresholds = (values[order[:-1]] + values[order[1:]]) / 2
    codes = order.numpy().astype(np.uint8)
    return tuple(thresholds.numpy()), (codes[:, None] << 4 | codes).reshape(-1)


def quantize_4bit(weight: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Codes and block maxima of a weight of n values.

    Args:
        weight: any shape, contiguous; bf16, fp16 or fp32, on the CPU.
        quant_type: `nf4` or `fp4`.
    Returns: codes, uint8 [ceil(n / 2), 1], the earlier of two weights in the high half; absmax, fp32 [ceil(n / 64)].
        As in bitsandbytes, a NaN makes its whole block NaN, and an infinity makes it zeros and NaN.
    Raises: ValueError: another dtype or device.
    """
    if weight.device.type != "cpu" or weight.dtype not in MAGNITUDE:
        raise ValueError(f"expected bf16, fp16 or fp32 on the CPU, found {weight.dtype} on {weight.device}")
    flat = weight.detach().view(-1)
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-flat.numel() // BLOCK), dtype=torch.float32, device="cpu")
    whole = flat.numel() // BLOCK * BLOCK
    absmax[: whole // BLOCK] = _block_maxima(flat[:whole])
    _quantize_blocks(flat[:whole], absmax[: whole // BLOCK], codes.numpy(), quant_type)
    if whole < flat.numel():
        absmax[-1] = _quantize_rest(flat[whole:], codes.numpy()[whole // 2 :], quant_type)
    return codes.view(-1, 1), absmax


def _block_maxima(flat: Tensor) -> Tensor:
    """Largest magnitude of each block, fp32; NaN where there is one, since its bits are the largest."""
    integer, mask = MAGNITUDE[flat.dtype]
    maxima = torch.empty(flat.numel() // BLOCK, dtype=integer, device="cpu")
    scratch = torch.empty(min(PIECE, flat.numel()), dtype=integer, device="cpu")
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE].view(integer)
        magnitude = torch.bitwise_and(piece, mask, out=scratch[: piece.numel()])
        torch.amax(magnitude.view(-1, BLOCK), dim=1, out=maxima[start // BLOCK : (start + piece.numel()) // BLOCK])
    return maxima.view(flat.dtype).float()


class _Scratch(threading.local):
    """What a thread reuses from tile to tile, and the main thread from weight to weight."""

    def __init__(self) -> None:
        self.scaled = np.empty(TILE, np.float32)
        self.level = np.empty(TILE, np.uint8)
        self.above = np.empty(TILE, np.uint8)


_scratch = _Scratch()


def _quantize_blocks(flat: Tensor, absmax: Tensor, codes: Array, quant_type: str) -> None:
    """Whole blocks, tile by tile, in several threads if there are many."""
    inverse = (1.0 / absmax.clamp(min=TINY)).numpy()[:, None]
    finite = absmax.isfinite().numpy()
    source = flat.view(torch.int16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()

    def quantize_tile(start: int) -> None:
        tile = source[start : start + TILE]
        blocks = slice(start // BLOCK, (start + len(tile)) // BLOCK)
        scaled = _scratch.scaled[: len(tile)]
        if flat.dtype == torch.bfloat16:  # the upper half of an fp32
            np.left_shift(tile.view(np.uint16), 16, out=scaled.view(np.uint32), dtype=np.uint32)
            tile = scaled
        with np.errstate(invalid="ignore"):  # infinity times zero
            np.multiply(tile.reshape(-1, BLOCK), inverse[blocks], out=scaled.reshape(-1, BLOCK))
        packed = codes[start // 2 : (start + len(tile)) // 2]
        _encode(scaled, packed, quant_type, finite=bool(finite[blocks].all()))

    starts = range(0, len(source), TILE)
    threads = min(torch.get_num_threads(), len(source) // WEIGHTS_PER_THREAD)
    if threads < 2:
        for start in starts:
            quantize_tile(start)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(quantize_tile, starts))


def _quantize_rest(flat: Tensor, codes: Array, quant_type: str) -> float:
    """The last weights, fewer than a block: bitsandbytes divides by a maximum of at least TINY, and stores that.

    An odd last weight shares its byte with a zero.
    """
    maximum = flat.float().abs().max().clamp(min=TINY)
    scaled = torch.nn.functional.pad(flat.float() / maximum, (0, flat.numel() % 2))
    _encode(scaled.numpy(), codes, quant_type, finite=bool(maximum.isfinite()))
    return maximum.item()


def _encode(scaled: Array, codes: Array, quant_type: str, finite: bool) -> None:
    """Values of -1 to 1, an even number up to TILE, to two 4-bit codes a byte.

    A NaN is above no threshold here and gets the topmost level, where `bucketize` puts it.
    """
    thresholds, code_pairs = _levels(quant_type)
    level, above = _scratch.level[: len(scaled)], _scratch.above[: len(scaled)]
    with np.errstate(invalid="ignore"):
        np.greater(scaled, thresholds[0], out=level.view(np.bool_))
        for threshold in thresholds[1:]:
            np.greater(scaled, threshold, out=above.view(np.bool_))
            np.add(level, above, out=level)
    if not finite:
        level[np.isnan(scaled)] = LEVELS - 1
    pairs, shifted = level.view("<u2"), above.view("<u2")  # the first of two in the low byte
    np.left_shift(pairs, 4, out=shifted)
    np.right_shift(pairs, 8, out=pairs)
    np.bitwise_or(shifted, pairs, out=pairs)
    np.copyto(codes, pairs, casting="unsafe")
    if quant_type != "nf4":
        codes[:] = code_pairs[codes]


# ------------------------------------------------------------------------------------------------ dequantization


@functools.cache
def _kernels() -> Any:
    """bitsandbytes' shared library, or None where it has none for this machine."""
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    return None if isinstance(lib, ErrorHandlerMockBNBNativeLibrary) else lib


def has_kernels(codes: Tensor) -> bool:
    """Whether the two functions below can be used: real memory on a CPU for which bitsandbytes has its library."""
    return codes.device.type == "cpu" and type(codes) is Tensor and _kernels() is not None


def dequantize_8bit(codes: Tensor, scale: Tensor, code: Tensor, block: int) -> Tensor:
    """`code[codes]` times the scale of its block, fp32 [n].

    Args: codes uint8 [n]; scale fp32 [n / block]; code, the table, fp32 [256].
    """
    values = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    _call("cdequantize_blockwise_cpu_fp32", (code, codes, scale, values), (block, codes.numel()))
    return values


def dequantize_4bit(codes: Tensor, absmax: Tensor, quant_type: str, block: int, out: Tensor) -> Tensor:
    """Overwrite `out` [..., columns], contiguous bf16, fp16 or fp32, with the weight; return it.

    Args: codes uint8 [ceil(n / 2), 1]; absmax fp32 [n / block].
    """
    columns = out.shape[-1] if out.dim() else 1
    if columns % 2 or block >= 2048:  # where bitsandbytes itself does not use the kernel
        value = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, block, quant_type, out.shape, out.dtype)
        return out.copy_(value.view(out.shape))
    name = f"cdequantize_blockwise_cpu_{quant_type}_{_KERNEL_DTYPES[out.dtype]}"
    _call(name, (codes, absmax, out), (block, out.numel() // max(columns, 1), columns))
    return out


_KERNEL_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _call(name: str, tensors: tuple[Tensor, ...], numbers: tuple[int, ...]) -> None:
    """Raises: ValueError: a tensor that is not one piece of host memory."""
    if not all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors):
        raise ValueError(f"{name}: every tensor must be contiguous and on the CPU")
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    getattr(_kernels(), name)(*pointers, *map(ctypes.c_longlong, numbers))
