"""A base of any shape without its weights: the real model, linears and streamer, in memory that nobody writes to.

Why: on the simulated accelerator with `shapes_only` a step of a 70B takes seconds and no memory, by the code that
trains it; what the planner says is held to that. How: the loader's own model, whose tensors are allocated, not read.
A block on the host is pinned memory that is never touched; one on disk is "read" by a reader that leaves it as it is.
Imported by: tests, tools.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_kit import recipe
from qlora_kit.base.linear import FrozenLinear
from qlora_kit.base.loader import Base, Placement, build_frozen
from qlora_kit.base.shards import Entry, Shards
from qlora_kit.base.streaming import STREAMED, BlockStreamer, StreamedBlock, lay_out, spread
from qlora_kit.planning.shapes import model_shapes, read_config

NOWHERE = Path("nowhere")


class _NoFiles(Shards):
    """Files whose tensors are never read."""

    def __init__(self) -> None:
        super().__init__([])

    def read_bytes(self, entry: Entry, target: memoryview) -> None:
        pass


def unfilled_base(
    settings: recipe.Model, device: torch.device | str, placement: Placement | None = None, host_blocks: int = 0
) -> Base:
    """A base as `load_base` makes it, its weights whatever the memory holds.

    Args:
        settings: the recipe's `model` section; `path` may be a name of the catalogue, only its config is read.
        placement: of its blocks.
        host_blocks: with `disk`, how many of the streamed blocks live in host memory, evenly spread.
    Raises: ModelError: unsupported architecture.
    """
    placement, device = placement or Placement(), torch.device(device)
    config, source = read_config(settings.path)
    shapes = model_shapes(config, source)
    model = build_frozen(config, settings, device, source)
    blocks = model.get_submodule(shapes.architecture.blocks)
    away = {index: _linears(blocks[index]) for index in sorted(placement.streamed(shapes.layers))}
    stays_away = {linear for linears in away.values() for linear in linears}
    for module in model.modules():
        _allocate(module, device, STREAMED if module in stays_away else frozenset())
    model.tie_weights()
    model.eval().requires_grad_(False)
    on_host = len(away) if placement.tier == "host" else host_blocks
    streamer = _streamer(away, on_host, device) if away else None
    return Base(model, shapes.architecture, settings, NOWHERE, "none", device, streamer)


def _linears(block: nn.Module) -> list[FrozenLinear]:
    return [module for module in block.modules() if isinstance(module, FrozenLinear)]


def _allocate(module: nn.Module, device: torch.device, left_out: frozenset[str]) -> None:
    """Give the module's own tensors that have none memory on the device."""
    for tensors in (module._buffers, module._parameters):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.is_meta and name not in left_out:
                made: Any = torch.empty_like(tensor, device=device)
                tensors[name] = made if tensors is module._buffers else nn.Parameter(made, requires_grad=False)


def _streamer(away: dict[int, list[FrozenLinear]], on_host: int, device: torch.device) -> BlockStreamer:
    streamed, hosted = {}, spread(on_host, len(away))
    for position, (index, linears) in enumerate(away.items()):
        pieces, size_bytes = lay_out(linears)
        if position in hosted:
            host = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=device.type != "cpu")
            streamed[index] = StreamedBlock(pieces, size_bytes, host=host)
        else:
            extents = [Entry(NOWHERE, piece.dtype, piece.shape, 0, piece.size_bytes) for piece in pieces]
            streamed[index] = StreamedBlock(pieces, size_bytes, extents=extents)
    return BlockStreamer(streamed, _NoFiles(), device)
