"""The weights that an update is added to: the original ones, or their 4-bit copies dequantized, tensor by tensor.

Both are read as an ordinary checkpoint (`Shards`), so that merging does not know which it has. A base that is a 4-bit
checkpoint has only the second. Imported by: merge, choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.base import nf4
from qlora_kit.base.prequantized import DequantizedShards, packed_weights
from qlora_kit.base.shards import Shards, find_shards
from qlora_kit.errors import ModelError
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config


@dataclass(frozen=True)
class Quantization:
    """How the base was quantized in training, as the adapter records it."""

    quant_type: str  # nf4, fp4 or none
    double_quant: bool
    dtype: torch.dtype

    @classmethod
    def recorded(cls, record: dict[str, Any]) -> Quantization:
        """From `adapters.store.provenance`; an adapter that says nothing was trained beside 16-bit weights."""
        dtype = getattr(torch, record.get("dtype", "bfloat16"))
        return cls(record.get("quantization", "none"), record.get("double_quant", True), dtype)

    def through(self, weight: Tensor) -> Tensor:
        """The weight, [O, I], that training saw: quantized and dequantized again."""
        stored = nf4.quantize(weight.to(self.dtype), self.quant_type, self.double_quant)
        return nf4.dequantize(stored, tuple(weight.shape), self.quant_type, self.dtype)


class ThroughFourBits(Shards):
    """An ordinary checkpoint whose linears of the blocks are read as training saw them."""

    def __init__(self, shards: Shards, shapes: ModelShapes, quantization: Quantization) -> None:
        super().__init__([], shards.error)
        self.metadata, self.entries = shards.metadata, shards.entries
        self._shards, self._quantization = shards, quantization
        self._transposed = shapes.architecture.transposed
        linears = {name for name, _ in shapes.linear_weights}
        self._through = {name for name in shards.entries if shapes.architecture.name_in_model(name) in linears}

    def as_stored(self, name: str) -> bool:
        return name not in self._through

    def read(self, name: str) -> Tensor:
        value = self._shards.read(name)
        if name not in self._through:
            return value
        value = self._quantization.through(value.t() if self._transposed else value)
        return value.t() if self._transposed else value


@dataclass(frozen=True)
class BaseFiles:
    """A base as its files are.

    Attributes:
        packed: the files hold 4-bit weights, so there are no original ones.
    """

    folder: Path
    config: dict[str, Any]
    shapes: ModelShapes
    stored: Shards
    packed: dict[str, Any] | None

    @classmethod
    def open(cls, folder: Path) -> BaseFiles:
        """Raises: ModelError: no model there, or one that this kit does not know."""
        config, source = read_config(str(folder))
        shapes, stored = model_shapes(config, source), Shards(find_shards(folder))
        return cls(folder, config, shapes, stored, packed_weights(stored, shapes.architecture, config, source))

    def resolve(self, onto: str, quantization: Quantization, adapter: Path) -> str:
        """`original` or `dequantized`; `auto` is what the adapter was trained beside.

        Raises: ModelError: the weights that were asked for cannot be had.
        """
        if self.packed is not None:
            if onto == "original":
                raise ModelError(
                    f"{self.folder}: a 4-bit checkpoint has no original weights; give the original model as --model"
                )
            return "dequantized"
        quantized = quantization.quant_type != "none"
        if onto == "auto":
            return "dequantized" if quantized else "original"
        if onto == "dequantized" and not quantized:
            raise ModelError(f"{adapter}: does not record a 4-bit base; merge with --onto original")
        return onto

    def weights(self, onto: str, quantization: Quantization) -> Shards:
        """The base under the names of an ordinary checkpoint; `onto` as `resolve` gave it."""
        if self.packed is not None:
            return DequantizedShards(self.stored, self.packed, self.shapes.architecture, quantization.dtype)
        return ThroughFourBits(self.stored, self.shapes, quantization) if onto == "dequantized" else self.stored
