"""W = W0 + (alpha / r) B A into a full-precision model, tensor by tensor: memory is that of the largest tensor.

How: every tensor of the base's files is read, updated in fp32 where the adapter has a branch, rounded once to the
output dtype, and written under its own name into a shard of the same name. W0 is the original weight, or its NF4
copy dequantized, which is what the adapter was trained beside. The folder appears only when it is whole.
Source: Hu et al. 2021, arXiv:2106.09685, section 4.1. Imported by: the `merge` command, the quickstart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit import files
from qlora_kit.adapters.store import StoredAdapter, provenance, read_whole_adapter, require_same_base
from qlora_kit.architectures import Architecture
from qlora_kit.base import nf4
from qlora_kit.base.companions import carry
from qlora_kit.base.prequantized import DequantizedShards, packed_weights
from qlora_kit.base.shards import Entry, Shards, find_shards, write_tensors
from qlora_kit.base.source import base_fingerprint
from qlora_kit.console import progress
from qlora_kit.errors import DiskError, ModelError, NonFiniteError
from qlora_kit.export.tables import Layout, lay_out
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config


@dataclass(frozen=True)
class MergeReport:
    """What was merged, written as `merge_report.json`."""

    base: str
    adapter: str
    onto: str
    dtype: str
    merged_tensors: int
    copied_tensors: int
    bytes_written: int
    base_fingerprint: str
    sha256: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Merger:
    """Gives each tensor of the output."""

    shards: Shards
    architecture: Architecture
    adapter: StoredAdapter
    layout: Layout
    dequantized: dict[str, Any]  # linears to take from their 4-bit copy -> how it was made; empty: onto the original
    dtype: torch.dtype

    def produce(self, file_name: str) -> Tensor:
        """One output tensor. Raises: NonFiniteError: it does not fit the output dtype."""
        value = self.shards.read(self.layout.sources.get(file_name, file_name))
        name = self.architecture.name_in_model(file_name) or ""
        linear = name.removesuffix(".weight")
        if linear in self.dequantized:
            value = self._oriented(_through_4_bits(self._oriented(value), **self.dequantized[linear]))
        if linear in self.adapter.branches:
            value = self._oriented(self.adapter.branches[linear].apply(self._oriented(value.float())))
        elif name in self.adapter.tensors:
            value = self.adapter.tensors[name].apply(value.float())
        rounded = value.to(self.dtype) if value.is_floating_point() else value
        if not torch.isfinite(rounded).all():
            peak = value.abs().max().item()
            raise NonFiniteError(
                f"tensor {file_name!r} reaches {peak:.3g}, outside {self.dtype}; nothing was written; "
                "use --dtype bfloat16"
            )
        return rounded

    def _oriented(self, weight: Tensor) -> Tensor:
        """[O, I] as the file stores it, or the reverse."""
        return weight.t() if self.architecture.transposed else weight


def _through_4_bits(weight: Tensor, quantization: str, double_quant: bool, dtype: torch.dtype) -> Tensor:
    """The weight that training saw: quantized and dequantized again."""
    stored = nf4.quantize(weight.to(dtype), quantization, double_quant)
    return nf4.dequantize(stored, tuple(weight.shape), quantization, dtype)


def merge_model(
    base: Path, adapter: Path, out: Path, *, dtype: str = "float16", onto: str = "auto", any_base: bool = False
) -> MergeReport:
    """Write the merged model to the folder `out`.

    Args:
        onto: `original` weights, their `dequantized` 4-bit copies, or `auto`: what the adapter was trained beside.
        any_base: accept a base that is not the one the adapter records.
    Raises: DiskError: `out` exists, or too little space. ModelError: base and adapter do not fit. NonFiniteError: a
        value is outside the output dtype. Nothing is left behind in any of these cases.
    """
    _require_new(out, base, adapter)
    config, source = read_config(str(base))
    shapes = model_shapes(config, source)
    shards = Shards(find_shards(base))
    stored = read_whole_adapter(adapter, shapes, base)
    digest, record = base_fingerprint(shards), provenance(adapter)
    if not any_base:
        require_same_base(adapter, digest, base)
    packed = packed_weights(shards, shapes.architecture, config, source)
    onto = _resolve_onto(onto, record, adapter) if packed is None else _onto_4_bits(onto, base)
    settings = {
        "quantization": record.get("quantization", "none"),
        "double_quant": record.get("double_quant", True),
        "dtype": getattr(torch, record.get("dtype", "bfloat16")),
    }
    dequantized = dict.fromkeys(_linear_shapes(shapes), settings) if onto == "dequantized" else {}
    if packed is not None:
        shards, dequantized = DequantizedShards(shards, packed, shapes.architecture, settings["dtype"]), {}
    layout = lay_out(shards.entries, shards.read, stored, shapes)
    merger = _Merger(shards, shapes.architecture, stored, layout, dequantized, getattr(torch, dtype))
    sizes = {name: _output_bytes(entry, merger.dtype) for name, entry in layout.entries.items()}
    files.require_free_space(out, sum(sizes.values()), "the merged model")
    with files.atomic_folder(out) as aside:
        _write_weights(aside, merger, sizes)
        _write_config(aside, config | layout.config, dtype)
        carry(base, aside)
        report = MergeReport(
            base=str(base),
            adapter=str(adapter),
            onto=onto,
            dtype=dtype,
            merged_tensors=len(stored.branches) + len(stored.tensors),
            copied_tensors=len(sizes) - len(stored.branches) - len(stored.tensors),
            bytes_written=sum(sizes.values()),
            base_fingerprint=digest,
            sha256={path.name: files.sha256(path) for path in sorted(aside.iterdir())},
        )
        files.write_json(aside / "merge_report.json", report.to_json())
    return report


def _require_new(out: Path, base: Path, adapter: Path) -> None:
    inside = (out.resolve(), *out.resolve().parents)
    if base.resolve() in inside or adapter.resolve() in inside:
        raise DiskError(f"{out}: lies in the base's or the adapter's folder; choose another --out")
    if out.exists():
        raise DiskError(f"{out}: already exists; choose another --out, or remove it")


def _resolve_onto(onto: str, record: dict[str, Any], adapter: Path) -> str:
    """Raises: ModelError: the 4-bit copy was asked for and the adapter does not say how it was made."""
    quantized = record.get("quantization", "none") != "none"
    if onto == "auto":
        return "dequantized" if quantized else "original"
    if onto == "dequantized" and not quantized:
        raise ModelError(f"{adapter}: does not record a 4-bit base; merge with --onto original")
    return onto


def _onto_4_bits(onto: str, base: Path) -> str:
    """Raises: ModelError: the original weights were asked for, and the base is a 4-bit checkpoint."""
    if onto == "original":
        raise ModelError(f"{base}: a 4-bit checkpoint has no original weights; give the original model as --model")
    return "dequantized"


def _linear_shapes(shapes: ModelShapes) -> dict[str, tuple[int, int]]:
    """(out, in) features of every linear of the blocks, by full name."""
    return {
        f"{shapes.architecture.blocks}.{layer}.{linear.name}": (linear.out_features, linear.in_features)
        for layer in range(shapes.layers)
        for linear in shapes.linears
    }


def _output_bytes(entry: Entry, dtype: torch.dtype) -> int:
    if not entry.dtype.is_floating_point:
        return entry.size_bytes
    return entry.size_bytes // entry.dtype.itemsize * dtype.itemsize


def _write_weights(folder: Path, merger: _Merger, sizes: dict[str, int]) -> None:
    """Shards of the same names as the base's, each tensor under its own name; the index if there are several."""
    entries = merger.layout.entries
    by_shard: dict[str, list[str]] = {}
    for name, entry in entries.items():
        by_shard.setdefault(entry.path.name, []).append(name)
    with progress("merging", sum(sizes.values())) as advance:

        def produce(name: str) -> Tensor:
            advance(sizes[name], name)
            return merger.produce(name)

        for shard, names in by_shard.items():
            layout = {
                name: (
                    merger.dtype if entries[name].dtype.is_floating_point else entries[name].dtype,
                    entries[name].shape,
                )
                for name in names
            }
            write_tensors(folder / shard, layout, produce, {"format": "pt"})
    if len(by_shard) > 1:
        weight_map = {name: entry.path.name for name, entry in entries.items()}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        files.write_json(folder / "model.safetensors.index.json", index)


def _write_config(folder: Path, config: dict[str, Any], dtype: str) -> None:
    """The base's config with the new dtype and without a trace of quantization."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    files.write_json(folder / "config.json", kept | {"dtype": dtype})
