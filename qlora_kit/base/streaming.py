"""Blocks that do not live on the device: brought in before they run, let go after, the next while this one computes.

Why: then one decoder block, not the model, decides what fits. How: each streamed block has a source (a flat tensor in
host memory, or extents of the checkpoint's own files) and borrows one of a few slots (`slots`); its linears' stored
tensors become views of it. A slot keeps its block until it is needed for another, so where forward turns into backward
the last blocks are still there.
Memory: that of `slots`, for the largest block.
Imported by: loader (builds it), training.blocks (acquire and release at the block's boundary).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_kit.base.linear import FrozenLinear, frozen_linears
from qlora_kit.base.shards import Entry, Shards
from qlora_kit.base.slots import Slots, Source
from qlora_kit.planning.components import aligned, blocks_of_a_slab

InFiles = dict[tuple[FrozenLinear, str], Entry]  # stored tensors that stay in the model's files
STREAMED = frozenset({"codes", "absmax", "absmax_scale", "dense"})  # the rest of a linear is a few bytes: it stays


@dataclass(frozen=True)
class Placement:
    """Where the weights live.

    Attributes:
        tier: of the blocks: `device`, `host` memory, or `disk`: the model's own files, read when a block runs.
        resident: with the other two, how many blocks live on the device all the same, evenly spread.
        host: with `disk`, how many of those that do not live in host memory, evenly spread among them.
        embeddings: the same choice of three for embedding and head. On a CPU `host` is the device itself.
    """

    tier: str = "device"
    resident: int = 0
    embeddings: str = "device"
    host: int = 0

    def tiers(self, layers: int) -> dict[int, str]:
        """`host` or `disk` for each block that does not live on the device, by index."""
        if self.tier == "device":
            return {}
        streamed = sorted(set(range(layers)) - spread(min(self.resident, layers), layers))
        in_host = spread(len(streamed) if self.tier == "host" else min(self.host, len(streamed)), len(streamed))
        return {index: "host" if position in in_host else "disk" for position, index in enumerate(streamed)}


@dataclass(frozen=True)
class Piece:
    """One stored tensor of a linear within its block's bytes."""

    linear: FrozenLinear
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    def view(self, buffer: Tensor) -> Tensor:
        """This tensor as a view of the block's bytes, uint8 [>= offset + size]."""
        return buffer[self.offset : self.offset + self.size_bytes].view(self.dtype).view(self.shape)

    def attach(self, buffer: Tensor) -> None:
        """Let the linear use this tensor where it now is."""
        setattr(self.linear, self.name, self.view(buffer))

    def detach(self) -> None:
        """Leave the linear without it: using it now is an error of torch's, never a stale value."""
        setattr(self.linear, self.name, torch.empty(self.shape, dtype=self.dtype, device="meta"))


def lay_out(linears: Sequence[FrozenLinear]) -> tuple[list[Piece], int]:
    """Where each stored tensor of a block's linears lies in a flat buffer, and the buffer's bytes."""
    pieces, end = [], 0
    for linear in linears:
        for name in linear.stored:
            if name not in STREAMED:
                continue
            tensor = getattr(linear, name)
            start = aligned(end)
            size_bytes = tensor.numel() * tensor.element_size()
            pieces.append(Piece(linear, name, tensor.dtype, tuple(tensor.shape), start, size_bytes))
            end = start + size_bytes
    return pieces, end


@dataclass(frozen=True)
class StreamedBlock:
    """A block that is not resident: the layout of its bytes, and where they come from."""

    pieces: list[Piece]
    source: Source


class BlockStreamer:
    """Gives each block its weights when it is to run.

    Args:
        blocks: the streamed ones by index of the block.
        shards: the files that their sources refer to.
        device: where the slots are.
        slots: at least 2; more hide slower sources.
    """

    def __init__(
        self, blocks: Mapping[int, StreamedBlock], shards: Shards, device: torch.device, slots: int = 2
    ) -> None:
        self.blocks = dict(blocks)
        self._slots = Slots({index: block.source for index, block in self.blocks.items()}, shards, device, slots)

    @property
    def buffers(self) -> list[Tensor]:
        """Device memory of all slots, uint8."""
        return self._slots.buffers

    @contextlib.contextmanager
    def block(self, index: int, following: int | None) -> Iterator[None]:
        """Within the with-block, block `index` has its weights; `following` is fetched meanwhile.

        Raises: ModelError: its bytes cannot be read; names the file.
        """
        if index not in self.blocks:
            self._slots.fetch(following)
            yield
            return
        pieces = self.blocks[index].pieces
        with self._slots.lent(index, following) as buffer:
            try:
                for piece in pieces:
                    piece.attach(buffer)
                yield
            finally:
                for piece in pieces:
                    piece.detach()


def stream_blocks(
    blocks: Mapping[int, nn.Module], in_host: Set[int], shards: Shards, in_files: InFiles, device: torch.device
) -> BlockStreamer:
    """A streamer for blocks whose linears are in host memory, or have stayed in the files.

    Args:
        blocks: by index.
        in_host: the indices of those in host memory; they are packed block by block, pinned for an accelerator.
        in_files: stored tensors of the linears of the others, as far as they have stayed in the files.
    """
    streamed = {}
    for index in sorted(blocks.keys() - in_host):
        linears = [linear for linear in frozen_linears(blocks[index]) if (linear, linear.stored[0]) in in_files]
        pieces, size_bytes = lay_out(linears)
        extents = tuple((piece.offset, in_files[piece.linear, piece.name]) for piece in pieces)
        streamed[index] = StreamedBlock(pieces, Source(size_bytes, extents=extents))
    layouts = {index: lay_out(frozen_linears(blocks[index])) for index in sorted(in_host)}
    rooms = host_memory([size_bytes for _, size_bytes in layouts.values()], pinned=device.type != "cpu")
    for (index, (pieces, size_bytes)), room in zip(layouts.items(), rooms):
        for piece in pieces:
            piece.view(room).copy_(getattr(piece.linear, piece.name))
            piece.detach()
        for linear in frozen_linears(blocks[index]):
            for name in set(linear.stored) - STREAMED:
                setattr(linear, name, getattr(linear, name).to(device))
        streamed[index] = StreamedBlock(pieces, Source(size_bytes, room))
    return BlockStreamer(streamed, shards, device)


def host_memory(sizes: Sequence[int], *, pinned: bool) -> Iterator[Tensor]:
    """Room in host memory for each block, uint8 [its size].

    torch rounds pinned memory up to a power of two (a block of 428 MiB would take 512), so several blocks share an
    allocation of which little is wasted.
    """
    if not pinned:
        yield from (torch.empty(size, dtype=torch.uint8) for size in sizes)
        return
    largest = max(sizes, default=0)
    left = list(sizes)
    while left:
        count = blocks_of_a_slab(largest, len(left))
        slab = torch.empty(count * largest, dtype=torch.uint8, pin_memory=True)
        for number in range(count):
            yield slab[number * largest :][: left.pop(0)]


def spread(resident: int, total: int) -> set[int]:
    """Which of `total` blocks are the resident ones: evenly spread, so that transfers find compute to hide behind."""
    return {round(position * total / resident) for position in range(resident)} if resident else set()
