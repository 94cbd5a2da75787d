"""A GGUF file is written: header, then tensor by tensor, in pieces; it appears under its name when it is whole.

Why not the `gguf` package's own writer for the data: it opens its file by itself and takes whole arrays. Its header is
used, and its quantization, which is the reference of q8_0.
How: a tensor is asked for when its turn comes and rounded once, a few rows at a time, so memory is that of the largest
tensor as it is stored. The `gguf` package is imported only when a file is written. Imported by: export.gguf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qlora_kit import files
from qlora_kit.base.shards import bytes_of
from qlora_kit.console import progress
from qlora_kit.errors import DiskError, NonFiniteError, RecipeError

PIECE_ELEMENTS = 1 << 22  # rounded at a time: 16 MiB of fp32
BLOCKS = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34)}  # type -> elements of a block, its bytes
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        shape: as torch has it, [rows, columns]; GGUF lists dimensions the other way round.
        kind: a key of BLOCKS.
        produce: gives the values when their turn comes, of any floating dtype.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    produce: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        """Of its data, without padding."""
        elements, size = BLOCKS[self.kind]
        return math.prod(self.shape) // elements * size


def gguf_package() -> ModuleType:
    """Raises: RecipeError: it is not installed."""
    try:
        import gguf
    except ImportError:
        raise RecipeError("GGUF files need the gguf package: python -m pip install 'qlora_kit[gguf]'") from None
    return gguf  # type: ignore[no-any-return]


def kind_of(shape: Sequence[int], dtype: str) -> str:
    """The type of a tensor: f32 for vectors, `dtype` for matrices; q8_0 only where rows are whole blocks."""
    if len(shape) == 1:
        return "f32"
    return "f16" if shape[-1] % BLOCKS[dtype][0] else dtype


def write_gguf(out: Path, architecture: str, fields: Mapping[str, Any], tensors: Sequence[GgufTensor]) -> int:
    """Write the file; returns its size in bytes.

    Args:
        architecture: llama.cpp's name of it.
        fields: full name -> str, bool, int, float or a list of one of these.
    Raises: RecipeError: no `gguf` package. DiskError: `out` exists, or too little space. NonFiniteError: a value is
        outside the type of its tensor. Nothing is left behind in any of these cases.
    """
    writer = _header(architecture, fields, tensors)
    if out.exists():
        raise DiskError(f"{out}: already exists; choose another --out, or remove it")
    total = sum(tensor.size_bytes for tensor in tensors)
    files.require_free_space(out, total, "the GGUF file")
    with files.atomic_file(out) as file, progress("writing GGUF", total) as advance:
        writer.fout, writer.state = [file], type(writer.state).EMPTY  # the file is ours: durable, and aside until whole
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            file.write(bytes(-file.tell() % writer.data_alignment))
            for piece in _pieces(tensor):
                file.write(piece)
            advance(tensor.size_bytes, tensor.name)
        file.write(bytes(-file.tell() % writer.data_alignment))
        return file.tell()


def _header(architecture: str, fields: Mapping[str, Any], tensors: Sequence[GgufTensor]) -> Any:
    """The package's writer, told everything but the data."""
    gguf = gguf_package()
    writer = gguf.GGUFWriter(None, architecture)
    for name, value in fields.items():
        kind = gguf.GGUFValueType.get_type(value)
        if kind is gguf.GGUFValueType.INT32 and value >= 0:
            kind = gguf.GGUFValueType.UINT32  # llama.cpp refuses sizes and ids with a sign
        if value or not isinstance(value, str | list):
            writer.add_key_value(name, value, kind)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind.upper()]
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.size_bytes, raw_dtype=kind)
    return writer


def _pieces(tensor: GgufTensor) -> Iterator[memoryview | bytes]:
    """The data as the file holds it, whole rows at a time."""
    value = tensor.produce()
    if tuple(value.shape) != tensor.shape:
        raise ValueError(f"{tensor.name}: {list(value.shape)} produced, {list(tensor.shape)} promised")
    rows = max(1, PIECE_ELEMENTS // max(1, math.prod(tensor.shape[1:])))
    for piece in value.split(rows):
        yield _rounded(piece, tensor)


def _rounded(piece: Tensor, tensor: GgufTensor) -> memoryview | bytes:
    """Raises: NonFiniteError: NaN, infinity, or a value outside f16."""
    stored = _DTYPES.get(tensor.kind, torch.float32)
    value = piece.to(stored)
    scales_fit = tensor.kind != "q8_0" or piece.abs().max().item() / 127 <= torch.finfo(torch.float16).max
    if not scales_fit or not torch.isfinite(value).all():
        peak = piece.abs().max().item()
        raise NonFiniteError(
            f"tensor {tensor.name!r} reaches {peak:.3g}, outside {tensor.kind}; nothing was written; use --dtype bf16"
        )
    if tensor.kind == "q8_0":
        gguf = gguf_package()
        return bytes(gguf.quantize(value.contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0))
    return bytes_of(value.contiguous().reshape(-1).view(torch.uint8))
