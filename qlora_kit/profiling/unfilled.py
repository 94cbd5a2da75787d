"""A base of any shape without its weights: the real model, linears and streamer, in memory that nobody writes to.

Why: on the simulated accelerator with `shapes_only` a step of a 70B takes seconds and no memory, by the code that
trains it; what the planner says is held to that. How: the loader's own model, whose tensors are allocated, not read.
A block on the host is pinned memory that is never touched; one on disk is "read" by a reader that leaves it as it is.
Imported by: tests, tools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_kit import recipe
from qlora_kit.architectures import Architecture
from qlora_kit.base.linear import FrozenLinear, frozen_linears
from qlora_kit.base.loader import Base, build_frozen
from qlora_kit.base.shards import Entry, Shards
from qlora_kit.base.slots import Source
from qlora_kit.base.streaming import STREAMED, BlockStreamer, Placement, StreamedBlock, host_memory, lay_out
from qlora_kit.base.vocabulary import Table, fetch_from
from qlora_kit.planning.shapes import model_shapes, read_config

NOWHERE = Path("nowhere")


class _NoFiles(Shards):
    """Files whose tensors are never read."""

    def __init__(self) -> None:
        super().__init__([])

    def read_bytes(self, entry: Entry, target: memoryview) -> None:
        pass

    def read_rows(self, entry: Entry, rows: Sequence[int], target: memoryview) -> None:
        pass


def unfilled_base(settings: recipe.Model, device: torch.device | str, placement: Placement | None = None) -> Base:
    """A base as `load_base` makes it, its weights whatever the memory holds.

    Args:
        settings: the recipe's `model` section; `path` may be a name of the catalogue, only its config is read.
        placement: of its blocks, embedding and head.
    Raises: ModelError: unsupported architecture.
    """
    placement, device = placement or Placement(), torch.device(device)
    config, source = read_config(settings.path)
    shapes = model_shapes(config, source)
    model = build_frozen(config, settings, device, source)
    blocks, tiers = model.get_submodule(shapes.architecture.blocks), placement.tiers(shapes.layers)
    away = {index: frozen_linears(blocks[index]) for index in tiers}
    if placement.embeddings != "device":
        _fetch_vocabulary(model, shapes.architecture, placement.embeddings, device)
    stays_away = {linear for linears in away.values() for linear in linears}
    for module in model.modules():
        _allocate(module, device, STREAMED if module in stays_away else frozenset())
    if placement.embeddings == "device":
        model.tie_weights()
    model.eval().requires_grad_(False)
    streamer = _streamer(away, tiers, device) if away else None
    return Base(model, shapes.architecture, settings, NOWHERE, "none", device, streamer)


def _fetch_vocabulary(model: Any, architecture: Architecture, tier: str, device: torch.device) -> None:
    """Put embedding and head elsewhere, in one table if they are tied."""
    table = None
    for name in (f"{architecture.embedding}.weight", f"{architecture.head}.weight"):
        if table is None or not model.config.tie_word_embeddings:
            weight = model.get_parameter(name)
            entry = Entry(NOWHERE, weight.dtype, tuple(weight.shape), 0, weight.numel() * weight.itemsize)
            host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True) if tier == "host" else None
            table = Table(device, weight.dtype, _NoFiles(), entry, host)
        fetch_from(model, name, table)


def _allocate(module: nn.Module, device: torch.device, left_out: frozenset[str]) -> None:
    """Give the module's own tensors that have none memory on the device."""
    for tensors in (module._buffers, module._parameters):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.is_meta and name not in left_out:
                made: Any = torch.empty_like(tensor, device=device)
                tensors[name] = made if tensors is module._buffers else nn.Parameter(made, requires_grad=False)


def _streamer(
    away: Mapping[int, Sequence[FrozenLinear]], tiers: Mapping[int, str], device: torch.device
) -> BlockStreamer:
    layouts = {index: lay_out(linears) for index, linears in away.items()}
    in_host = [index for index in layouts if tiers[index] == "host"]
    rooms = dict(zip(in_host, host_memory([layouts[index][1] for index in in_host], pinned=device.type != "cpu")))
    streamed = {}
    for index, (pieces, size_bytes) in layouts.items():
        extents = [(piece.offset, Entry(NOWHERE, piece.dtype, piece.shape, 0, piece.size_bytes)) for piece in pieces]
        from_files = Source(size_bytes, extents=tuple(extents))
        streamed[index] = StreamedBlock(pieces, Source(size_bytes, rooms[index]) if index in rooms else from_files)
    return BlockStreamer(streamed, _NoFiles(), device)
