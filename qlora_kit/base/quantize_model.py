"""From a model folder to a 4-bit checkpoint that this kit and plain transformers load: a few tensors in memory.

Why: quantizing a 70B takes minutes, and reading its 140 GB longer; a checkpoint of 40 GB loads as fast as it is read.
How: the linears of the decoder blocks are quantized, exactly as `train` would, and written as `prequantized` describes;
all other tensors are copied in the dtype of computation. The original's fingerprint goes into the files' metadata, so
that an adapter knows its base in either form. The folder appears only when it is whole.
Imported by: the `quantize` command, export.four_bits, export.output (how files are cut), training.loop,
tools/random_base.py (the layout alone).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit import files
from qlora_kit.architectures import Architecture
from qlora_kit.base import nf4
from qlora_kit.base.companions import carry
from qlora_kit.base.prequantized import FINGERPRINT, STATE
from qlora_kit.base.shards import Shards, find_shards, write_tensors
from qlora_kit.base.source import fingerprint
from qlora_kit.console import progress
from qlora_kit.errors import DiskError, ModelError, NonFiniteError
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config

SHARD_BYTES = 5_000_000_000
STATE_BYTES = 256  # of the JSON, padded with spaces: its length must be known before the weight is quantized
ALIGNMENT = 8

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class QuantizeReport:
    """What was written."""

    base: str
    base_fingerprint: str
    quant_type: str
    double_quant: bool
    dtype: str
    quantized_tensors: int
    copied_tensors: int
    bytes_read: int
    bytes_written: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """How to quantize: also what a state says of every weight."""

    quant_type: str
    double_quant: bool
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def is_quantized(folder: Path) -> bool:
    """Whether a model folder says that it holds quantized weights."""
    return read_config(str(folder))[0].get("quantization_config") is not None


def quantize_model(
    model: Path, out: Path, *, quant_type: str = "nf4", double_quant: bool = True, dtype: str = "bfloat16"
) -> QuantizeReport:
    """Write the 4-bit checkpoint of `model` to the folder `out`.

    Args:
        dtype: that weights are rounded to before they are quantized, and of what stays unquantized; `model.dtype` of a
            recipe. With the same dtype, training sees the same base as from the original.
    Raises: DiskError: `out` exists, or too little space. ModelError: not a model, or quantized already.
        NonFiniteError: a weight is NaN or infinite, or too large for `dtype`. Nothing is left behind in these cases.
    """
    if out.exists():
        raise DiskError(f"{out}: already exists; choose another --out, or remove it")
    config, source = read_config(str(model))
    if config.get("quantization_config") is not None:
        raise ModelError(f"{source}: quantization_config: already quantized; give the original model")
    shapes, shards = model_shapes(config, source), Shards(find_shards(model))
    settings = Settings(quant_type, double_quant, getattr(torch, dtype))
    writer = Writer(shards, shapes, settings)
    shard_layouts = split(writer.layouts(), SHARD_BYTES)
    total = sum(map(size_bytes, shard_layouts.values()))
    files.require_free_space(out, total, "the 4-bit checkpoint")
    digest = fingerprint(shards)
    with files.atomic_folder(out) as aside:
        _write_shards(aside, writer, shard_layouts, {"format": "pt", FINGERPRINT: digest})
        carry(model, aside)
        kept = {key: value for key, value in config.items() if key != "torch_dtype"}
        quantization = {"quantization_config": quantization_config(settings, writer.head_names)}
        files.write_json(aside / "config.json", kept | {"dtype": dtype} | quantization)
    return QuantizeReport(
        base=str(model),
        base_fingerprint=digest,
        quant_type=quant_type,
        double_quant=double_quant,
        dtype=dtype,
        quantized_tensors=len(writer.linears),
        copied_tensors=len(writer.names) - len(writer.linears),
        bytes_read=sum(entry.size_bytes for entry in shards.entries.values()),
        bytes_written=total,
    )


class Writer:
    """Lays out and produces the tensors of the checkpoint, which keep the names that the base's files have."""

    def __init__(self, shards: Shards, shapes: ModelShapes, settings: Settings) -> None:
        self.shards, self.settings = shards, settings
        self.architecture: Architecture = shapes.architecture
        wanted = dict(shapes.linear_weights)
        head = f"{self.architecture.head}.weight"
        in_model = {name: self.architecture.name_in_model(name) for name in shards.entries}
        heads = {head, *(file_name for file_name, name in in_model.items() if name == head)}
        self.head_names = sorted(name.removesuffix(".weight") for name in heads)
        dropped = {None, head} if shapes.tied else {None}  # computed buffers, and the embedding a second time
        self.names = [file_name for file_name, name in in_model.items() if name not in dropped]
        self.linears = {file_name: wanted[name] for file_name, name in in_model.items() if name in wanted}
        if missing := wanted.keys() - in_model.values():
            raise ModelError(
                f"{shapes.source}: tensor {min(missing)!r} is missing ({len(missing)} of {len(wanted)} are)"
            )
        self._made: dict[str, Tensor] = {}

    def layouts(self) -> Iterator[Layout]:
        """For each tensor of the base, in the order of its files, the tensors that are written for it."""
        for name in self.names:
            entry = self.shards.entries[name]
            if name in self.linears:
                if entry.shape != self.linears[name]:
                    expected = list(self.linears[name])
                    raise ModelError(f"{entry.path}: {name}: shape {list(entry.shape)}, the config asks for {expected}")
                yield self._layout(name)
            else:
                yield {name: (self.settings.dtype if entry.dtype.is_floating_point else entry.dtype, entry.shape)}

    def produce(self, name: str) -> Tensor:
        """One tensor of the checkpoint. Raises: NonFiniteError: not finite in the dtype of computation."""
        if name in self._made:
            return self._made.pop(name)
        if name in self.shards.entries:
            value = self.shards.read(name)
            return self._rounded(name, value) if value.is_floating_point() else value
        self._made = self._quantized(name.rpartition(".")[0])  # the first part in the layout is no state
        return self._made.pop(name)

    def _layout(self, name: str) -> Layout:
        return packed_layout(name, math.prod(self.linears[name]), self.settings)

    def _rounded(self, name: str, value: Tensor) -> Tensor:
        rounded = value.to(self.settings.dtype)
        # A sum is finite only if all its terms are, and takes a sixtieth of the time of looking at each.
        if not rounded.sum().isfinite() and not torch.isfinite(rounded).all():
            peak = value.abs().max().item()
            raise NonFiniteError(
                f"tensor {name!r} reaches {peak:.3g}, outside {self.settings.dtype}; nothing was written"
            )
        return rounded

    def _quantized(self, name: str) -> dict[str, Tensor]:
        """The parts of a weight, quantized as [O, I], which is how transformers saves Conv1D layers too."""
        weight = self._rounded(name, self.shards.read(name))
        weight = weight.t() if self.architecture.transposed else weight
        stored = nf4.quantize(weight, self.settings.quant_type, self.settings.double_quant)
        offset = stored["absmax_offset"].item() if self.settings.double_quant else 0.0
        parts = {name: stored["codes"], f"{name}.absmax": stored["absmax"]}
        if self.settings.double_quant:
            parts[f"{name}.nested_absmax"] = stored["absmax_scale"]
        return parts | tables(name, tuple(weight.shape), self.settings, offset)


def packed_layout(name: str, weights: int, settings: Settings) -> Layout:
    """The parts of a quantized weight: together a multiple of 8 bytes long, so that fp32 parts stay aligned."""
    shapes = nf4.state_shapes(weights, settings.double_quant)
    layout: Layout = {}
    if settings.double_quant:
        layout[f"{name}.nested_absmax"] = (torch.float32, shapes["absmax_scale"][0])
        layout[f"{name}.nested_quant_map"] = (torch.float32, (256,))
    layout[f"{name}.quant_map"] = (torch.float32, (16,))
    layout[f"{name}.absmax"] = (shapes["absmax"][1], shapes["absmax"][0])
    layout[name] = (torch.uint8, shapes["codes"][0])
    state_bytes = STATE_BYTES + -size_bytes(layout) % ALIGNMENT
    return layout | {f"{name}{STATE}{settings.quant_type}": (torch.uint8, (state_bytes,))}


def tables(name: str, shape: tuple[int, ...], settings: Settings, offset: float) -> dict[str, Tensor]:
    """The parts of a quantized weight, [O, I], that do not grow with it: its state as JSON, and the tables of levels.

    Args:
        offset: the mean of absmax; not used without double quantization.
    """
    parts = {f"{name}.quant_map": nf4.level_values(settings.quant_type)}
    state: dict[str, Any] = {
        "quant_type": settings.quant_type,
        "blocksize": nf4.BLOCK,
        "dtype": settings.dtype_name,
        "shape": list(shape),
    }
    if settings.double_quant:
        parts[f"{name}.nested_quant_map"] = nf4.absmax_code(torch.device("cpu"))
        state |= {"nested_blocksize": nf4.NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    state_name = f"{name}{STATE}{settings.quant_type}"
    (state_bytes,) = packed_layout(name, math.prod(shape), settings)[state_name][1]
    text = json.dumps(state, allow_nan=False).encode().ljust(state_bytes)
    return parts | {state_name: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def size_bytes(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def split(layouts: Iterable[Layout], limit_bytes: int) -> dict[str, Layout]:
    """Files by name, of at most `limit_bytes` (or one weight). In each, quantized ones come first: so all stay aligned.

    Args:
        layouts: of one weight each, which stays in one file.
    """
    shards: list[list[Layout]] = [[]]
    shard_bytes = 0
    for layout in layouts:
        if shards[-1] and shard_bytes + size_bytes(layout) > limit_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(layout)
        shard_bytes += size_bytes(layout)
    return dict(zip(_shard_names(len(shards)), map(_joined, shards)))


def _joined(layouts: list[Layout]) -> Layout:
    quantized = [layout for layout in layouts if len(layout) > 1]
    dense = [item for layout in layouts if len(layout) == 1 for item in layout.items()]
    dense.sort(key=lambda item: -item[1][0].itemsize)
    return {name: value for layout in quantized for name, value in layout.items()} | dict(dense)


def _write_shards(folder: Path, writer: Writer, layouts: Mapping[str, Layout], metadata: dict[str, str]) -> None:
    """The files, and their index if there are several."""
    with progress("quantizing", sum(map(size_bytes, layouts.values()))) as advance:
        for file_name, layout in layouts.items():

            def produce(name: str, layout: Layout = layout) -> Tensor:
                advance(size_bytes({name: layout[name]}), name)
                return writer.produce(name)

            write_tensors(folder / file_name, layout, produce, metadata)
    write_index(folder, layouts)


def _shard_names(count: int) -> list[str]:
    """The names that transformers gives to `count` files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, layouts: Mapping[str, Layout]) -> None:
    """Say which file holds which tensor, if there are several."""
    if len(layouts) == 1:
        return
    weight_map = {name: file_name for file_name, layout in layouts.items() for name in layout}
    index = {"metadata": {"total_size": sum(map(size_bytes, layouts.values()))}, "weight_map": weight_map}
    files.write_json(folder / "model.safetensors.index.json", index)


def quantization_config(settings: Settings, skipped: list[str]) -> dict[str, Any]:
    """What transformers' `BitsAndBytesConfig` writes."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": settings.dtype_name,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": settings.quant_type,
        "bnb_4bit_use_double_quant": settings.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
