"""4-bit checkpoints in bitsandbytes' layout: how the files hold a quantized weight, read without dequantizing it.

For a linear X of a model quantized by transformers, or by `qlora-kit quantize`, the files hold

    X.weight                                    uint8 [ceil(n / 2), 1]   the codes of W [O, I], for Conv1D models too
    X.weight.absmax                             fp32 or, with double quantization, uint8 [n / block]
    X.weight.nested_absmax, .nested_quant_map   fp32 [n / block / 256], [256]; with double quantization only
    X.weight.quant_map                          fp32 [16]
    X.weight.quant_state.bitsandbytes__nf4      uint8: JSON with type, block, shape, and the offset of absmax

and config.json a `quantization_config`. What is quantized is read from the files, not from the config's list of
skipped modules: a weight without these companions is dense. Source: bitsandbytes' `QuantState.as_dict`.
Imported by: loader, quantize_model, export.merge.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlora_kit.architectures import Architecture
from qlora_kit.base import nf4
from qlora_kit.base.shards import Shards, bytes_of
from qlora_kit.errors import ModelError

PART = re.compile(
    r"(?P<weight>.+\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(nf4|fp4))"
)
STATE = ".quant_state.bitsandbytes__"
STATE_BYTES_LIMIT = 4096
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes' kernels take
FINGERPRINT = "qlora_kit.base_fingerprint"  # safetensors metadata: the original's, before quantization
LEVEL_TOLERANCE = 1e-3  # kernels have their own table; another one in the file means another type


@dataclass(frozen=True)
class PackedWeight:
    """How the files hold one weight.

    Attributes:
        file_name: name of the codes in the files; its companions' names begin with it.
        quant_type: `nf4` or `fp4`.
        block: weights that share one absmax.
        shape: [O, I] of the linear.
        offset: mean of absmax, subtracted before it was quantized; None: absmax is fp32.
    """

    file_name: str
    quant_type: str
    block: int
    shape: tuple[int, ...]
    offset: float | None

    @property
    def double_quant(self) -> bool:
        return self.offset is not None

    def read(self, shards: Shards) -> dict[str, Tensor]:
        """The stored tensors under `nf4`'s names, on the host.

        Raises: ModelError: one is missing, of another shape or dtype, or a table is not bitsandbytes'.
        """
        bulk = {name: shards.read(file_name) for name, file_name in self.bulk(shards).items()}
        return bulk | self.read_small(shards)

    def bulk(self, shards: Shards) -> dict[str, str]:
        """Where the stored tensors that grow with the weight lie: `nf4`'s name -> name in the files.

        Raises: ModelError: one is missing, or of another shape or dtype.
        """
        names = {"codes": self.file_name, "absmax": f"{self.file_name}.absmax"}
        if self.double_quant:
            names["absmax_scale"] = f"{self.file_name}.nested_absmax"
        shapes = nf4.state_shapes(math.prod(self.shape), self.double_quant, self.block)
        for name, file_name in names.items():
            entry = shards.entry(file_name)
            if (entry.shape, entry.dtype) != shapes[name]:
                expected = f"{shapes[name][1]} {list(shapes[name][0])}"
                found = f"{name} is {entry.dtype} {list(entry.shape)}"
                raise ModelError(f"{self._where(shards)}: {found}, expected {expected}")
        return names

    def read_small(self, shards: Shards) -> dict[str, Tensor]:
        """The stored tensors of a few bytes, on the host.

        Raises: ModelError: a table is not bitsandbytes'.
        """
        stored = {}
        if self.offset is not None:
            stored["absmax_offset"] = torch.tensor(self.offset, dtype=torch.float32)
        levels = self._table(shards, "quant_map", 16)
        if not torch.allclose(levels, nf4.level_values(self.quant_type), rtol=0, atol=LEVEL_TOLERANCE):
            raise ModelError(f"{self._where(shards)}: quant_map: not the levels of {self.quant_type}")
        if self.double_quant:
            code = self._table(shards, "nested_quant_map", 256)
            if not torch.equal(code, nf4.absmax_code(torch.device("cpu"))):
                stored["absmax_code"] = code  # of an older bitsandbytes
        return stored

    def dequantize(self, shards: Shards, dtype: torch.dtype) -> Tensor:
        """The weight, [O, I], on the host."""
        return nf4.dequantize(self.read(shards), self.shape, self.quant_type, dtype, block=self.block)

    def rows(self, shards: Shards, dtype: torch.dtype) -> Callable[[int, int], Tensor] | None:
        """See `Shards.rows`; None: rows share a block. The absmax of all rows is held, in fp32."""
        columns = self.shape[-1]
        if columns % self.block:
            return None
        small, names = self.read_small(shards), self.bulk(shards)
        absmax = nf4.dequantize_absmax(small | {name: shards.read(names[name]) for name in names if name != "codes"})
        entry, blocks = shards.entry(self.file_name), columns // self.block

        def dequantized(start: int, stop: int) -> Tensor:
            codes = torch.empty((stop - start) * columns // 2, dtype=torch.uint8)
            shards.read_range(entry, start * columns // 2, bytes_of(codes))
            stored = {"codes": codes[:, None], "absmax": absmax[start * blocks : stop * blocks]}
            return nf4.dequantize(stored, (stop - start, columns), self.quant_type, dtype, block=self.block)

        return dequantized

    def _table(self, shards: Shards, name: str, length: int) -> Tensor:
        """Raises: ModelError: not `length` finite fp32 values."""
        table = shards.read(f"{self.file_name}.{name}")
        if (tuple(table.shape), table.dtype) != ((length,), torch.float32) or not table.isfinite().all():
            raise ModelError(f"{self._where(shards)}: {name}: expected {length} finite fp32 values")
        return table

    def _where(self, shards: Shards) -> str:
        return f"{shards.entries[self.file_name].path}: {self.file_name}"


class DequantizedShards(Shards):
    """A 4-bit checkpoint read as if it were an ordinary one: its tensors under the names of the original's.

    Args:
        packed: what `packed_weights` found.
        dtype: of the dequantized weights.
    """

    def __init__(
        self, shards: Shards, packed: Mapping[str, PackedWeight], architecture: Architecture, dtype: torch.dtype
    ) -> None:
        super().__init__([], shards.error)
        self.metadata = shards.metadata
        self._shards, self._dtype = shards, dtype
        self._packed = {weight.file_name: weight for weight in packed.values()}
        in_blocks = {weight.file_name for name, weight in packed.items() if name.startswith(f"{architecture.blocks}.")}
        self._transposed = in_blocks if architecture.transposed else set()
        for name, entry in shards.entries.items():
            weight = self._packed.get(name)
            if weight is not None:
                shape = weight.shape[::-1] if name in self._transposed else weight.shape
                size_bytes = math.prod(shape) * dtype.itemsize
                entry = replace(entry, dtype=dtype, shape=shape, size_bytes=size_bytes)
            if PART.fullmatch(name) is None:
                self.entries[name] = entry

    def as_stored(self, name: str) -> bool:
        return name not in self._packed

    def read(self, name: str) -> Tensor:
        """The tensor, newly allocated on the host, dequantized if it is packed."""
        if name not in self._packed:
            return self._shards.read(name)
        value = self._packed[name].dequantize(self._shards, self._dtype)
        return value.t() if name in self._transposed else value

    def rows(self, name: str) -> Callable[[int, int], Tensor]:
        """As `Shards.rows`; a packed weight whose rows are whole blocks is dequantized rows by rows."""
        if name not in self._packed or name in self._transposed:
            return super().rows(name)
        return self._packed[name].rows(self._shards, self._dtype) or super().rows(name)


def packed_weights(
    shards: Shards, architecture: Architecture, config: Mapping[str, Any], source: str
) -> dict[str, PackedWeight] | None:
    """The quantized weights of a checkpoint by their name in the model; None: it is an ordinary, unquantized one.

    Args:
        config: the checkpoint's; `source`, where it came from, opens the message.
    Raises: ModelError: quantized by another method or to 8 bits, or what the files say of a weight is not valid.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    where = f"{source}: quantization_config"
    if not isinstance(quantization, Mapping):
        raise ModelError(f"{where}: expected an object, found {type(quantization).__name__}")
    method = quantization.get("quant_method", "bitsandbytes" if "load_in_4bit" in quantization else "unknown")
    if method != "bitsandbytes":
        raise ModelError(
            f"{where}: already quantized ({method!s:.80}); give the unquantized model, or a 4-bit "
            "checkpoint made with bitsandbytes"
        )
    if not quantization.get("load_in_4bit", quantization.get("_load_in_4bit")):
        raise ModelError(
            f"{where}: already quantized (bitsandbytes, 8 bits); give the unquantized model, or a 4-bit checkpoint"
        )
    packed = {}
    for name in shards.entries:
        match = PART.fullmatch(name)
        if match is not None and match["weight"] not in shards.entries:
            raise ModelError(f"{shards.entries[name].path}: {name!r} belongs to {match['weight']!r}, which is missing")
        if match is not None and STATE in name:
            weight = _packed_weight(shards, match["weight"], name)
            packed[architecture.name_in_model(weight.file_name) or weight.file_name] = weight
    return packed


def _packed_weight(shards: Shards, weight: str, state_name: str) -> PackedWeight:
    """Raises: ModelError: the codes are not bytes, or the state is not what bitsandbytes writes."""
    entry, codes = shards.entries[state_name], shards.entries[weight]
    if codes.dtype != torch.uint8:
        raise ModelError(
            f"{codes.path}: {weight}: 4-bit codes stored as {codes.dtype} (bnb_4bit_quant_storage); only uint8 is "
            "supported: quantize the original model again, with `qlora-kit quantize`"
        )
    try:
        if entry.size_bytes > STATE_BYTES_LIMIT:
            raise ValueError(f"{entry.size_bytes} bytes")
        state = json.loads(shards.read(state_name).numpy().tobytes())
        offset = state.get("nested_offset")
        made = PackedWeight(
            file_name=weight,
            quant_type=state_name.rpartition("__")[2],
            block=_one_of(state["blocksize"], BLOCKS, "blocksize"),
            shape=tuple(_one_of(size, range(1, 1 << 32), "shape") for size in state["shape"]),
            offset=None if offset is None else _finite(offset),
        )
        _one_of(state["quant_type"], (made.quant_type,), "quant_type")
        _one_of(state.get("nested_blocksize", nf4.NESTED_BLOCK), (nf4.NESTED_BLOCK,), "nested_blocksize")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise ModelError(f"{entry.path}: {state_name}: not a valid quantization state: {problem!r:.200}") from problem
    return made


def _one_of(value: Any, allowed: Any, field: str) -> Any:
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{field}: {value!r:.80}")
    return value


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"nested_offset: {value!r:.80}")
    return float(value)
