"""A base model of any shape of the catalogue with random weights, written at the speed of the disk.

    python -m tools.random_base --shape llama-3-70b --dir D             NF4, 36 GB, as `qlora-kit quantize` writes it
    python -m tools.random_base --shape llama-3.2-1b --dir D --dense    bf16, for transformers and peft too

Why: what a step takes in time and memory does not depend on what the weights say, and nobody can fetch 140 GB for a
benchmark. How: one buffer of random bytes and one of random normal values are drawn; every tensor is a piece of them
from another place, so nothing the size of a tensor is ever in memory. Their lengths are primes: rows do not repeat.
Weights have a standard deviation of 0.02, those that write to the residual stream of 0.02 / sqrt(2 x layers) (GPT-2's
rule), norms are 1: activations stay finite through 126 blocks. No tokenizer: data are random ids.
Imported by: prove_fit, bench_roofline, bench_streaming, bench_peers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit import files
from qlora_kit.base import nf4
from qlora_kit.base.prequantized import FINGERPRINT
from qlora_kit.base.quantize_model import (
    Layout,
    Settings,
    packed_layout,
    quantization_config,
    size_bytes,
    split,
    tables,
    write_index,
)
from qlora_kit.base.shards import DTYPE_NAMES, Shards, bytes_of, find_shards
from qlora_kit.console import progress
from qlora_kit.errors import DiskError, ModelError
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config
from qlora_kit.units import format_bytes
from tools.harness import command

SHARD_BYTES = 4_000_000_000
STANDARD_DEVIATION = 0.02
ABSMAX_SPREAD = 0.1  # of the mean; the 8-bit codes of absmax are random as well
POOL_BYTES = 67_108_859  # a prime
POOL_VALUES = 16_777_213  # a prime
MARKER = "random_base.json"
SETTINGS = Settings("nf4", True, torch.bfloat16)


class Pool:
    """Random bytes, drawn once, given out from where the last ones ended."""

    def __init__(self, values: Tensor) -> None:
        self._bytes, self._position = bytes_of(values.view(torch.uint8)), 0

    def take(self, count: int) -> Iterator[memoryview]:
        """`count` bytes in as many pieces as it takes."""
        while count:
            piece = self._bytes[self._position : self._position + count]
            self._position = (self._position + len(piece)) % len(self._bytes)
            count -= len(piece)
            yield piece


class _Writer:
    """Lays out the tensors of the checkpoint and gives their bytes."""

    def __init__(self, shapes: ModelShapes, dense: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(POOL_VALUES, generator=generator).mul_(STANDARD_DEVIATION)
        self._small = 1 / math.sqrt(2 * shapes.layers)
        self._normal, self._narrow = Pool(normal.bfloat16()), Pool(normal.mul_(self._small).bfloat16())
        self._codes = Pool(torch.randint(0, 256, (POOL_BYTES,), dtype=torch.uint8, generator=generator))
        self._fixed: dict[str, Tensor] = {}
        self._absmax: dict[str, float] = {}
        self.shapes, self.dense = shapes, dense
        row = shapes.architecture
        self._outputs = (f"{row.attention_out}.weight", f"{row.mlp_out}.weight")

    def layouts(self) -> Iterator[Layout]:
        """For each tensor of the model the tensors that are written for it."""
        shapes, blocks = self.shapes, self.shapes.architecture.blocks
        for name, shape in shapes.outer_tensors:
            yield {name: (torch.bfloat16, shape)}
        for layer in range(shapes.layers):
            for linear in shapes.linears:
                name = f"{blocks}.{layer}.{linear.name}.weight"
                if self.dense:
                    yield {name: (torch.bfloat16, shapes.architecture.weight_shape(linear))}
                else:
                    yield self._packed(name, (linear.out_features, linear.in_features))
            for name, shape in shapes.block_tensors:
                yield {f"{blocks}.{layer}.{name}": (torch.bfloat16, shape)}

    def _packed(self, name: str, shape: tuple[int, int]) -> Layout:
        """Codes are random, so a weight's root mean square is that of the 16 levels, times absmax."""
        levels = nf4.level_values(SETTINGS.quant_type)
        wanted = STANDARD_DEVIATION * (self._small if name.endswith(self._outputs) else 1.0)
        self._absmax[name] = wanted / levels.square().mean().sqrt().item()
        self._fixed |= tables(name, shape, SETTINGS, self._absmax[name])
        return packed_layout(name, math.prod(shape), SETTINGS)

    def pieces(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[memoryview]:
        """The bytes of one tensor."""
        count = math.prod(shape)
        if name in self._fixed:
            yield bytes_of(self._fixed.pop(name).contiguous().view(torch.uint8))
        elif name.endswith(".nested_absmax"):
            scale = self._absmax.pop(name.removesuffix(".nested_absmax")) * ABSMAX_SPREAD
            yield bytes_of(torch.full(shape, scale).view(torch.uint8))
        elif dtype == torch.uint8:
            yield from self._codes.take(count)
        elif len(shape) == 1:
            yield bytes_of(torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype).view(torch.uint8))
        else:
            yield from (self._narrow if name.endswith(self._outputs) else self._normal).take(count * dtype.itemsize)


def shape_config(shape: str, layers: int | None = None) -> tuple[dict[str, Any], str]:
    """A config of the catalogue, or of a folder or config.json, with another number of blocks if asked, and a name."""
    config, _ = read_config(shape)
    name = Path(shape).parent.name if shape.endswith(".json") else Path(shape).name
    if layers is None:
        return config, name
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    return config | {key: layers}, f"{name}-{layers}-layers"


def random_base(shape: str, folder: Path, *, layers: int | None = None, dense: bool = False, seed: int = 0) -> Path:
    """The checkpoint's folder below `folder`, made now, or found complete from before.

    Args:
        shape: a name of the catalogue, a folder with config.json, or a config.json.
        layers: blocks, if not as many as the shape has.
        dense: bf16 instead of NF4 with double quantization.
    Raises: DiskError: too little space; or what lies there is not this checkpoint. ModelError: no such shape.
    """
    config, name = shape_config(shape, layers)
    out = folder / f"{name}-{'bf16' if dense else 'nf4'}"
    marker = {"config": config, "dense": dense, "seed": seed, "version": 1}
    if out.exists():
        _require_complete(out, marker)
        return out
    shapes = model_shapes(config, shape)
    writer = _Writer(shapes, dense, seed)
    layouts = split(writer.layouts(), SHARD_BYTES)
    total = sum(map(size_bytes, layouts.values()))
    files.require_free_space(out, total, f"the random checkpoint of {name}")
    metadata = {"format": "pt"} | ({} if dense else {FINGERPRINT: _fingerprint(marker)})
    with files.atomic_folder(out) as aside:
        with progress(f"writing {out.name}", total) as advance:
            for file_name, layout in layouts.items():
                _write_shard(aside / file_name, layout, writer, metadata)
                advance(size_bytes(layout), file_name)
        write_index(aside, layouts)
        quantization = {} if dense else {"quantization_config": quantization_config(SETTINGS, ["lm_head"])}
        files.write_json(aside / "config.json", config | {"dtype": "bfloat16"} | quantization)
        files.write_json(aside / MARKER, marker)
    return out


def _fingerprint(marker: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(marker, sort_keys=True).encode()).hexdigest()[:32]


def _require_complete(out: Path, marker: dict[str, Any]) -> None:
    """Raises: DiskError: the folder is not this checkpoint, or its files were cut."""
    try:
        found = json.loads((out / MARKER).read_text())
        Shards(find_shards(out))  # reads every header against its file's length
    except (OSError, ValueError, ModelError) as problem:
        raise DiskError(f"{out}: not a complete random checkpoint: {problem}; remove it, and it is made anew") from None
    if found != marker:
        raise DiskError(f"{out}: a random checkpoint of another config or seed; remove it, and it is made anew")


def _write_shard(path: Path, layout: Layout, writer: _Writer, metadata: dict[str, str]) -> None:
    entries = [
        (name, DTYPE_NAMES[dtype], shape, size_bytes({name: (dtype, shape)})) for name, (dtype, shape) in layout.items()
    ]
    with files.atomic_file(path) as file:
        file.write(files.safetensors_header(entries, metadata))
        for name, (dtype, shape) in layout.items():
            for piece in writer.pieces(name, dtype, shape):
                file.write(piece)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help="a model of the catalogue, a folder or a config.json")
    parser.add_argument("--dir", type=Path, required=True, help="the checkpoint becomes a folder in it")
    parser.add_argument("--layers", type=int, help="blocks, if not as many as the shape has")
    parser.add_argument("--dense", action="store_true", help="bf16, not quantized")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out = random_base(options.shape, options.dir, layers=options.layers, dense=options.dense, seed=options.seed)
    total = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {format_bytes(total)}")
    return 0


if __name__ == "__main__":
    command(main)
