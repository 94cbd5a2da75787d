"""Blocks that do not live on the device: brought in before they run, let go after, the next while this one computes.

Why: then one decoder block, not the model, decides what fits. How: each streamed block has a source (a flat tensor in
host memory, or extents of the checkpoint's own files) and borrows a slot, one of a few reused device buffers; its
linears' stored tensors become views of it. A slot keeps its block until it is needed for another, so where forward
turns into backward the last blocks are still there. On an accelerator copies run on a stream of their own, from pinned
memory, ordered by events both ways; files are read by a thread. On the CPU a block in host memory is used in place.
Memory: slots x the largest block on the device; for files on an accelerator as much again, pinned, on the host.
Imported by: loader (builds it), training.blocks (acquire and release at the block's boundary).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.linear import FrozenLinear
from qlora_kit.base.shards import Entry, Shards, bytes_of

ALIGNMENT = 256  # bytes; what kernels want of a tensor's start
InFiles = dict[tuple[FrozenLinear, str], Entry]  # stored tensors that stay in the model's files
STREAMED = frozenset({"codes", "absmax", "absmax_scale", "dense"})  # the rest of a linear is a few bytes: it stays


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
            start = -(-end // ALIGNMENT) * ALIGNMENT
            size_bytes = tensor.numel() * tensor.element_size()
            pieces.append(Piece(linear, name, tensor.dtype, tuple(tensor.shape), start, size_bytes))
            end = start + size_bytes
    return pieces, end


@dataclass
class StreamedBlock:
    """A block that is not resident: the layout of its bytes, and where they come from.

    Attributes:
        host: its bytes in host memory, or None.
        extents: else for each piece where it lies in the checkpoint's files.
    """

    pieces: list[Piece]
    size_bytes: int
    host: Tensor | None = None
    extents: list[Entry] = field(default_factory=list)


@dataclass
class _Slot:
    """A reused device buffer, and what is in it or on its way."""

    buffer: Tensor
    staging: Tensor | None = None  # pinned host memory, for files on an accelerator
    block: int | None = None
    in_use: bool = False
    last_use: int = 0
    arrived: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None
    copied: Any = None  # event on the copy stream: the bytes are in the buffer
    free: Any = None  # event on the compute stream: nobody reads the buffer any more


_Job = tuple[StreamedBlock, _Slot]


class BlockStreamer:
    """Gives each block its weights when it is to run.

    Args:
        blocks: the streamed ones by index of the block.
        shards: the files that `extents` refer to.
        device: where the slots are.
        slots: at least 2; more hide slower sources.
    """

    def __init__(
        self, blocks: Mapping[int, StreamedBlock], shards: Shards, device: torch.device, slots: int = 2
    ) -> None:
        if slots < 2:
            raise ValueError(f"{slots} slots: the next block could not be fetched while one computes")
        self.blocks, self.device = dict(blocks), device
        self._accelerated = device.type != "cpu"
        self._clock = 0
        largest = max((block.size_bytes for block in self.blocks.values()), default=0)
        needs_slots = any(self._needs_slot(block) for block in self.blocks.values())
        staged = self._accelerated and any(block.host is None for block in self.blocks.values())
        self._slots = [
            _Slot(
                torch.empty(largest, dtype=torch.uint8, device=device),
                torch.empty(largest, dtype=torch.uint8, pin_memory=True) if staged else None,
            )
            for _ in range(min(slots, len(self.blocks)) if needs_slots else 0)
        ]
        # One stream for each thread that copies: the caller's, and the reader's.
        self._host_copies = torch.Stream(device=device) if self._accelerated and needs_slots else None
        self._file_copies = torch.Stream(device=device) if staged else None
        for stream in (self._host_copies, self._file_copies):
            if stream is not None:  # the slots' memory may still be in use by what had it before
                stream.wait_stream(torch.accelerator.current_stream(device))
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        if any(block.host is None for block in self.blocks.values()):
            reader = (self._jobs, shards, self._file_copies)
            threading.Thread(target=_read_ahead, args=reader, name="qlora_kit block reader", daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)

    @property
    def slot_bytes(self) -> int:
        """Device memory of all slots."""
        return sum(slot.buffer.numel() for slot in self._slots)

    @contextlib.contextmanager
    def block(self, index: int, following: int | None) -> Iterator[None]:
        """Within the with-block, block `index` has its weights; `following` is fetched meanwhile.

        Raises: ModelError: its bytes cannot be read; names the file.
        """
        if index not in self.blocks:
            self._fetch(following)
            yield
            return
        block = self.blocks[index]
        slot = self._acquire(index)
        try:
            buffer = block.host if slot is None else slot.buffer
            assert buffer is not None
            for piece in block.pieces:
                piece.attach(buffer)
            self._fetch(following)
            yield
        finally:
            for piece in block.pieces:
                piece.detach()
            if slot is not None:
                self._release(slot)

    def _needs_slot(self, block: StreamedBlock) -> bool:
        return self._accelerated or block.host is None

    def _acquire(self, index: int) -> _Slot | None:
        """The slot that holds the block, its bytes arrived and visible to the current stream; None: used in place."""
        if not self._needs_slot(self.blocks[index]):
            return None
        slot = self._fetch(index)
        if slot is None:
            raise RuntimeError(f"block {index}: every slot is in use; one block may run at a time")
        slot.arrived.wait()
        if slot.failure is not None:
            failure, slot.block, slot.failure = slot.failure, None, None
            raise failure
        if slot.copied is not None:
            torch.accelerator.current_stream(self.device).wait_event(slot.copied)
        self._clock += 1
        slot.in_use, slot.last_use = True, self._clock
        return slot

    def _release(self, slot: _Slot) -> None:
        slot.in_use = False
        if self._accelerated:
            slot.free = torch.accelerator.current_stream(self.device).record_event()

    def _fetch(self, index: int | None) -> _Slot | None:
        """Start bringing a block in, unless it is there or on its way; None: no slot is free, or it needs none."""
        if index is None or index not in self.blocks or not self._needs_slot(self.blocks[index]):
            return None
        for slot in self._slots:
            if slot.block == index:
                return slot
        free = [slot for slot in self._slots if not slot.in_use and (slot.block is None or slot.arrived.is_set())]
        if not free:
            return None
        slot = min(free, key=lambda candidate: candidate.last_use)
        slot.block, slot.failure = index, None
        slot.arrived.clear()
        block = self.blocks[index]
        if block.host is None or self._host_copies is None:
            self._jobs.put((block, slot))
        else:
            _copy_in(block.host, slot, block.size_bytes, self._host_copies)
            slot.arrived.set()
        return slot


def _copy_in(source: Tensor, slot: _Slot, size_bytes: int, stream: torch.Stream) -> None:
    """Host bytes to the slot on a copy stream, after the last reader of the slot."""
    with stream:
        if slot.free is not None:
            stream.wait_event(slot.free)
        slot.buffer[:size_bytes].copy_(source[:size_bytes], non_blocking=True)
        slot.copied = stream.record_event()


def _read_ahead(jobs: queue.SimpleQueue[_Job | None], shards: Shards, stream: torch.Stream | None) -> None:
    """The reader thread: files into slots, or through pinned memory where the device is an accelerator.

    It holds no reference to the streamer, so that a base that is let go of lets its slots go too.
    """
    while (job := jobs.get()) is not None:
        block, slot = job
        try:
            if slot.staging is not None and slot.copied is not None:
                slot.copied.synchronize()  # the last copy out of the pinned memory
            target = slot.buffer if slot.staging is None else slot.staging
            for piece, extent in zip(block.pieces, block.extents):
                shards.read_bytes(extent, bytes_of(target[piece.offset : piece.offset + piece.size_bytes]))
            if slot.staging is not None and stream is not None:
                _copy_in(slot.staging, slot, block.size_bytes, stream)
        except BaseException as failure:  # raised where the block is needed
            slot.failure = failure
        slot.arrived.set()
        del job, block, slot


def stream_blocks(
    blocks: Mapping[int, nn.Module], shards: Shards, in_files: InFiles, device: torch.device
) -> BlockStreamer:
    """A streamer for blocks whose linears are in host memory, or have stayed in the files.

    Host memory is packed block by block into one tensor each, pinned where the device is an accelerator.
    """
    streamed = {}
    for index, block in blocks.items():
        linears = [module for module in block.modules() if isinstance(module, FrozenLinear)]
        if in_files:
            linears = [linear for linear in linears if (linear, linear.stored[0]) in in_files]
        pieces, size_bytes = lay_out(linears)
        if in_files:
            extents = [in_files[piece.linear, piece.name] for piece in pieces]
            streamed[index] = StreamedBlock(pieces, size_bytes, extents=extents)
            continue
        host = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=device.type != "cpu")
        for piece in pieces:
            piece.view(host).copy_(getattr(piece.linear, piece.name))
            piece.detach()
        for linear in linears:
            for name in set(linear.stored) - STREAMED:
                setattr(linear, name, getattr(linear, name).to(device))
        streamed[index] = StreamedBlock(pieces, size_bytes, host=host)
    return BlockStreamer(streamed, shards, device)


def spread(resident: int, total: int) -> set[int]:
    """Which of `total` blocks are the resident ones: evenly spread, so that transfers find compute to hide behind."""
    return {round(position * total / resident) for position in range(resident)} if resident else set()
