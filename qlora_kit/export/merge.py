"""W = W0 + (alpha / r) B A into a full-precision model, tile by tile: memory is that of one tensor, whatever the model.

How: every tensor of the base is read by tiles of rows; where the adapter has a branch the tile is updated in fp64, and
rounded once to the output dtype. `merged_rows` is the one place that knows what an adapter does to a weight.
`MergedShards` is the result, read as if it were an ordinary checkpoint: `output` writes it, GGUF export, the choice of
the base and `four_bits` read it. Why fp64: every element is the exact sum correctly rounded, which fp32 arithmetic
misses in fp16 for 1 element in 10^4; the disk is slower than the arithmetic either way.
Source: Hu et al. 2021, arXiv:2106.09685, section 4.1. Imported by: the `merge` command, choose, audit, tools.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit import __version__, files
from qlora_kit.adapter_files import CONFIG, WEIGHTS
from qlora_kit.adapters.store import provenance, read_whole_adapter, require_same_base
from qlora_kit.adapters.updates import StoredAdapter, StoredBranch, TensorUpdate
from qlora_kit.base.shards import Shards
from qlora_kit.base.source import base_fingerprint
from qlora_kit.errors import NonFiniteError, RecipeError
from qlora_kit.export.four_bits import Requantized
from qlora_kit.export.onto import FOUR_BITS, BaseFiles, Quantization
from qlora_kit.export.output import MergeReport, write_merged
from qlora_kit.export.rounding import round_once
from qlora_kit.export.tables import Layout, lay_out

TILE = 1 << 18  # elements; a thread holds about 20 bytes for each


@dataclass(frozen=True)
class Merge:
    """What is to be merged: base, adapter, and how.

    Attributes:
        onto: `original`, `dequantized` or `4bit`.
        dtype: of the output; of `4bit`, that of what is not quantized.
        changes: the adapter.
        fingerprint: the base's, as adapters record it.
    """

    base: BaseFiles
    adapter: Path
    onto: str
    dtype: torch.dtype
    quantization: Quantization
    changes: StoredAdapter
    fingerprint: str

    @cached_property
    def weights(self) -> Shards:
        """What is added to."""
        return self.base.weights(self.onto, self.quantization)

    @cached_property
    def shards(self) -> MergedShards:
        """The merged model."""
        return MergedShards(self)

    @cached_property
    def requantized(self) -> Requantized | None:
        """What is written of it where it is to be quantized again."""
        return Requantized(self) if self.onto == FOUR_BITS else None

    @cached_property
    def layout(self) -> Layout:
        """What the output is made of."""
        return lay_out(self.weights.entries, self.weights.read, self.changes, self.base.shapes)

    def linear(self, file_name: str) -> str:
        """The linear whose weight a tensor of the files is; the name of no linear if it is none."""
        return (self.base.shapes.architecture.name_in_model(file_name) or "").removesuffix(".weight")

    def update(self, file_name: str) -> StoredBranch | TensorUpdate | None:
        """What the adapter makes of a tensor of the output; None: nothing."""
        return self.changes.update(self.base.shapes.architecture.name_in_model(file_name) or "")

    @cached_property
    def digest(self) -> str:
        """Of everything that the output depends on: work of another digest is not continued."""
        shard_files = sorted({entry.path for entry in self.base.stored.entries.values()})
        parts = [__version__, self.fingerprint, self.onto, str(self.dtype), repr(self.quantization)]
        parts += [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in shard_files]
        parts += [files.sha256(self.adapter / name) for name in (CONFIG, WEIGHTS)]
        parts.append(json.dumps(self.base.config, sort_keys=True))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_merge(
    base: Path, adapter: Path, *, dtype: str | None = None, onto: str = "auto", any_base: bool = False
) -> Merge:
    """Check that base and adapter belong together; nothing is computed yet.

    Args:
        dtype: of the output; default: float16, of `4bit` the base's own.
        onto: `original` weights, their `dequantized` 4-bit copies, `4bit`: the sum quantized as the base is, or
            `auto`: what the adapter was trained beside.
        any_base: accept a base that is not the one the adapter records.
    Raises: ModelError: they do not, or the weights to merge onto cannot be had. RecipeError: a `dtype` that 4 bits
        do not leave open.
    """
    opened = BaseFiles.open(base)
    changes = read_whole_adapter(adapter, opened.shapes, base)
    digest, quantization = base_fingerprint(opened.stored), Quantization.recorded(provenance(adapter), opened.dtype)
    if not any_base:
        require_same_base(adapter, digest, base)
    onto = opened.resolve(onto, quantization, adapter)
    if onto == FOUR_BITS:
        quantization = opened.quantization_again(quantization, adapter)
        own = str(quantization.dtype).removeprefix("torch.")
        if dtype not in (None, own):
            raise RecipeError(f"--dtype: {dtype}: --onto 4bit keeps what is not quantized in the base's {own}; drop it")
        dtype = own
    return Merge(opened, adapter, onto, getattr(torch, dtype or "float16"), quantization, changes, digest)


class MergedShards(Shards):
    """The merged model, read as if it were an ordinary checkpoint in the output dtype."""

    def __init__(self, merge: Merge) -> None:
        super().__init__([], merge.weights.error)
        self._merge, self._weights = merge, merge.weights
        for name, entry in merge.layout.entries.items():
            dtype = merge.dtype if entry.dtype.is_floating_point else entry.dtype
            self.entries[name] = replace(entry, dtype=dtype, size_bytes=math.prod(entry.shape) * dtype.itemsize)

    def as_stored(self, name: str) -> bool:
        return False

    def read(self, name: str) -> Tensor:
        """The tensor, newly allocated on the host. Raises: NonFiniteError: it does not fit the output dtype."""
        entry = self.entry(name)
        flat, done = torch.empty(math.prod(entry.shape), dtype=entry.dtype), 0
        for tile in self.tiles(name):
            part = tile()
            flat[done : done + part.numel()] = part
            done += part.numel()
        return flat.view(entry.shape)

    def tiles(self, name: str) -> Iterator[Callable[[], Tensor]]:
        """Functions that give the pieces of a tensor, flat, in order. They may be called in any thread.

        Raises (from the functions): NonFiniteError: a value does not fit the output dtype.
        """
        source, shape = self._merge.layout.sources.get(name, name), self.entry(name).shape
        rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        update, transposed = self._merge.update(name), self._merge.base.shapes.architecture.transposed
        replaced = isinstance(update, TensorUpdate) and update.value is not None
        base_rows = self._weights.rows(source)

        def tile(start: int, stop: int) -> Tensor:
            # Replaced rows of the base are not needed, and some are not there where tokens were added.
            value = torch.empty(stop - start, columns, dtype=torch.float64) if replaced else base_rows(start, stop)
            if update is not None:
                value = merged_rows(value.double(), update, start, transposed)
            return self._rounded(name, value)

        by_columns = transposed and isinstance(update, StoredBranch) and update.magnitude is not None
        height = rows if by_columns else max(1, TILE // max(1, columns))
        for start in range(0, rows, height):
            yield lambda start=start: tile(start, min(start + height, rows))  # type: ignore[misc]

    def _rounded(self, name: str, value: Tensor) -> Tensor:
        """A tile in the output dtype. Raises: NonFiniteError: a value is outside of it."""
        if not value.is_floating_point():
            return value.reshape(-1)
        dtype = self._merge.dtype
        rounded = round_once(value, dtype) if value.dtype == torch.float64 else value.to(dtype)
        low, high = (extreme.item() for extreme in rounded.aminmax()) if rounded.numel() else (0.0, 0.0)
        if not math.isfinite(low) or not math.isfinite(high):
            peak = value.abs().max().item()
            raise NonFiniteError(
                f"tensor {name!r} reaches {peak:.3g}, outside {dtype}; nothing was written; use --dtype bfloat16"
            )
        return rounded.reshape(-1)


def merged_rows(value: Tensor, update: StoredBranch | TensorUpdate, start: int, transposed: bool) -> Tensor:
    """Rows of a tensor as the adapter has them; `value`, the base's rows from `start` on in fp64, is overwritten.

    Args:
        transposed: files hold the weights of linears as [I, O] (GPT-2). Of DoRA `value` is then the whole weight, since
            norms are taken along its columns.
    """
    if transposed and isinstance(update, StoredBranch):
        inputs = replace(update, lora_A=update.lora_A[:, start : start + len(value)])
        return inputs.apply(value.t()).t()
    return update.rows(start, start + len(value)).apply(value)


def merged_tensors(
    base: Path, adapter: Path, *, dtype: str | None = None, onto: str = "auto", any_base: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name in the files, merged tensor) one at a time, in the order of the base's files; see `open_merge`."""
    shards = open_merge(base, adapter, dtype=dtype, onto=onto, any_base=any_base).shards
    for name in shards.entries:
        yield name, shards.read(name)


def merge_model(
    base: Path, adapter: Path, out: Path, *, dtype: str | None = None, onto: str = "auto", any_base: bool = False
) -> MergeReport:
    """Write the merged model to the folder `out`; see `open_merge` and `output.write_merged`."""
    return write_merged(open_merge(base, adapter, dtype=dtype, onto=onto, any_base=any_base), out)
