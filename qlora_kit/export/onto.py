"""The weights that an update is added to: the original ones, or their 4-bit copies dequantized, tensor by tensor.

Both are read as an ordinary checkpoint (`Shards`), so that merging does not know which it has. A base that is a 4-bit
checkpoint has only the second.
Imported by: merge, four_bits, evidence, audit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.base import nf4
from qlora_kit.base.prequantized import DequantizedShards, PackedWeight, packed_weights
from qlora_kit.base.shards import Shards, find_shards
from qlora_kit.console import note
from qlora_kit.errors import ModelError
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config

FOUR_BITS = "4bit"  # onto the original weights where there are any, and quantized again


@dataclass(frozen=True)
class Quantization:
    """How the base was quantized in training, as the adapter records it."""

    quant_type: str  # nf4, fp4 or none
    double_quant: bool
    dtype: torch.dtype

    @classmethod
    def recorded(cls, record: dict[str, Any], dtype: str = "bfloat16") -> Quantization:
        """From `adapters.store.provenance`; an adapter that says nothing was trained beside 16-bit weights.

        Args:
            dtype: where the record names none.
        """
        kept = getattr(torch, record.get("dtype", dtype))
        return cls(record.get("quantization", "none"), record.get("double_quant", True), kept)

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a weight, [O, I]."""
        return nf4.quantize(weight.to(self.dtype), self.quant_type, self.double_quant)

    def dequantized(self, stored: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The weight, [O, I], of stored tensors."""
        return nf4.dequantize(stored, shape, self.quant_type, self.dtype)

    def through(self, weight: Tensor) -> Tensor:
        """The weight, [O, I], that training saw: quantized and dequantized again."""
        return self.dequantized(self.quantized(weight), tuple(weight.shape))


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
    packed: dict[str, PackedWeight] | None

    @classmethod
    def open(cls, folder: Path) -> BaseFiles:
        """Raises: ModelError: no model there, or one that this kit does not know."""
        config, source = read_config(str(folder))
        shapes, stored = model_shapes(config, source), Shards(find_shards(folder))
        return cls(folder, config, shapes, stored, packed_weights(stored, shapes.architecture, config, source))

    @property
    def dtype(self) -> str:
        """That the files' config names for computing, if it is one that this kit computes in."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        return named if named in ("float16", "float32") else "bfloat16"

    def resolve(self, onto: str, quantization: Quantization, adapter: Path) -> str:
        """`original`, `dequantized` or `4bit`; `auto` is what the adapter was trained beside.

        Raises: ModelError: the weights that were asked for cannot be had.
        """
        if onto == FOUR_BITS:
            return onto
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
            raise ModelError(
                f"{adapter}: does not record a 4-bit base; merge with --onto original, or, if it was trained beside "
                "one elsewhere, give that as --model (`qlora-kit quantize` writes it)"
            )
        return onto

    def quantization_again(self, recorded: Quantization, adapter: Path) -> Quantization:
        """How a merged model is quantized as this base is: by what the files say, else by what the adapter records.

        Raises: ModelError: the base has no 4 bits, or is quantized in a way that is not written here.
        """
        if self.packed is None:
            if recorded.quant_type == "none":
                raise ModelError(
                    f"{adapter}: does not record a 4-bit base to be quantized like; merge with --onto original "
                    "--dtype bfloat16, then run `qlora-kit quantize` on the result"
                )
            return recorded
        linears = {name for name, _ in self.shapes.linear_weights}
        if dense := linears - self.packed.keys():
            raise ModelError(
                f"{self.folder}: {min(dense)} is not quantized ({len(dense)} of {len(linears)} linears are not); "
                "--onto 4bit needs all of them in 4 bits; merge with --onto dequantized"
            )
        found = {
            (weight.quant_type, weight.double_quant, weight.block) for weight in map(self.packed.__getitem__, linears)
        }
        (quant_type, double_quant, block), *others = sorted(found)
        if others or block != nf4.BLOCK:
            raise ModelError(
                f"{self.folder}: quantized in {len(found)} ways, the first with blocks of {block}; --onto 4bit writes "
                f"one way, with blocks of {nf4.BLOCK}; merge with --onto dequantized, then run `qlora-kit quantize`"
            )
        note(f"{self.folder}: given the original weights instead, more of the update would survive 4 bits")
        return Quantization(quant_type, double_quant, recorded.dtype)

    def weights(self, onto: str, quantization: Quantization) -> Shards:
        """The base under the names of an ordinary checkpoint; `onto` as `resolve` gave it."""
        if self.packed is not None:
            return DequantizedShards(self.stored, self.packed, self.shapes.architecture, quantization.dtype)
        return ThroughFourBits(self.stored, self.shapes, quantization) if onto == "dequantized" else self.stored
