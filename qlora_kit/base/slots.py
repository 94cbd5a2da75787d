"""Bytes that do not live on the device, brought into a few buffers there ahead of their use.

How: each source (a flat tensor in host memory, or extents of files) borrows a slot, one of a few reused device buffers,
and the next source is fetched into another one meanwhile. A slot keeps its bytes until it is needed for others. On an
accelerator copies run on a stream of their own, from pinned memory, ordered by events both ways; files are read by a
thread. On the CPU a source in host memory is used in place.
Memory: slots x the largest source on the device; for files on an accelerator as much again, pinned, on the host.
Imported by: streaming (decoder blocks), vocabulary (chunks of the head).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_kit.base.owners import owner
from qlora_kit.base.shards import Entry, Shards, bytes_of


@dataclass(frozen=True)
class Source:
    """Where bytes come from.

    Attributes:
        host: they lie here in host memory, uint8 [size_bytes], or None.
        extents: else the parts of files that they are, each with its offset among them.
    """

    size_bytes: int
    host: Tensor | None = None
    extents: tuple[tuple[int, Entry], ...] = ()


@dataclass
class _Slot:
    """A reused device buffer, and what is in it or on its way."""

    buffer: Tensor
    staging: Tensor | None = None  # pinned host memory, for files on an accelerator
    holds: int | None = None
    in_use: bool = False
    last_use: int = 0
    arrived: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None
    copied: Any = None  # event on the copy stream: the bytes are in the buffer
    free: Any = None  # event on the compute stream: nobody reads the buffer any more


_Job = tuple[Source, _Slot]


class Slots:
    """Lends the bytes of sources, one at a time, the next one on its way.

    Args:
        sources: by a number that the caller gives.
        shards: the files that `extents` refer to.
        device: where the slots are.
        count: of slots, at least 2; more hide slower sources.
    """

    def __init__(self, sources: Mapping[int, Source], shards: Shards, device: torch.device, count: int = 2) -> None:
        if count < 2:
            raise ValueError(f"{count} slots: the next bytes could not be fetched while the ones before are used")
        self.sources, self.device = dict(sources), device
        self._accelerated = device.type != "cpu"
        self._clock = 0
        largest = max((source.size_bytes for source in self.sources.values()), default=0)
        needs_slots = any(self._needs_slot(source) for source in self.sources.values())
        staged = self._accelerated and any(source.host is None for source in self.sources.values())
        with owner("workspace"):
            self._slots = [
                _Slot(
                    torch.empty(largest, dtype=torch.uint8, device=device),
                    torch.empty(largest, dtype=torch.uint8, pin_memory=True) if staged else None,
                )
                for _ in range(min(count, len(self.sources)) if needs_slots else 0)
            ]
        # One stream for each thread that copies: the caller's, and the reader's.
        self._host_copies = torch.Stream(device=device) if self._accelerated and needs_slots else None
        self._file_copies = torch.Stream(device=device) if staged else None
        for stream in (self._host_copies, self._file_copies):
            if stream is not None:  # the slots' memory may still be in use by what had it before
                stream.wait_stream(torch.accelerator.current_stream(device))
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        if any(source.host is None for source in self.sources.values()):
            reader = (self._jobs, shards, self._file_copies)
            threading.Thread(target=_read_ahead, args=reader, name="qlora_kit reader", daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)

    @property
    def buffers(self) -> list[Tensor]:
        """Device memory of all slots, uint8."""
        return [slot.buffer for slot in self._slots]

    @contextlib.contextmanager
    def lent(self, index: int, following: int | None = None) -> Iterator[Tensor]:
        """The bytes of source `index`, uint8 [>= its size], valid within the block; `following` is fetched meanwhile.

        Raises: ModelError: they cannot be read; names the file.
        """
        slot = self._acquire(index)
        buffer = self.sources[index].host if slot is None else slot.buffer
        assert buffer is not None
        try:
            self.fetch(following)
            yield buffer
        finally:
            if slot is not None:
                self._release(slot)

    def fetch(self, index: int | None) -> _Slot | None:
        """Start bringing a source in, unless it is there or on its way; None: no slot is free, or it needs none."""
        if index is None or index not in self.sources or not self._needs_slot(self.sources[index]):
            return None
        for slot in self._slots:
            if slot.holds == index:
                return slot
        free = [slot for slot in self._slots if not slot.in_use and (slot.holds is None or slot.arrived.is_set())]
        if not free:
            return None
        slot = min(free, key=lambda candidate: candidate.last_use)
        slot.holds, slot.failure = index, None
        slot.arrived.clear()
        source = self.sources[index]
        if source.host is None or self._host_copies is None:
            self._jobs.put((source, slot))
        else:
            _copy_in(source.host, slot, source.size_bytes, self._host_copies)
            slot.arrived.set()
        return slot

    def settle(self) -> None:
        """Order what comes after all copies, also those nobody waited for: to be called before the slots are let go."""
        for slot in self._slots:
            if slot.holds is not None:
                slot.arrived.wait()
            if slot.copied is not None:
                torch.accelerator.current_stream(self.device).wait_event(slot.copied)

    def _needs_slot(self, source: Source) -> bool:
        return self._accelerated or source.host is None

    def _acquire(self, index: int) -> _Slot | None:
        """The slot that holds the source, its bytes arrived and visible to the current stream; None: used in place."""
        if not self._needs_slot(self.sources[index]):
            return None
        slot = self.fetch(index)
        if slot is None:
            raise RuntimeError(f"source {index}: every slot is in use; one may be lent at a time")
        slot.arrived.wait()
        if slot.failure is not None:
            failure, slot.holds, slot.failure = slot.failure, None, None
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


def _copy_in(source: Tensor, slot: _Slot, size_bytes: int, stream: torch.Stream) -> None:
    """Host bytes to the slot on a copy stream, after the last reader of the slot."""
    with stream:
        if slot.free is not None:
            stream.wait_event(slot.free)
        slot.buffer[:size_bytes].copy_(source[:size_bytes], non_blocking=True)
        slot.copied = stream.record_event()


def _read_ahead(jobs: queue.SimpleQueue[_Job | None], shards: Shards, stream: torch.Stream | None) -> None:
    """The reader thread. It holds no reference to the `Slots`, nor to a slot that is not being filled: so what is let
    go of lets its buffers go too."""
    while (job := jobs.get()) is not None:
        source, slot = job
        try:
            _read_in(source, slot, shards, stream)
        except BaseException as failure:  # raised where the bytes are needed
            slot.failure = failure
        arrived = slot.arrived
        del job, source, slot
        arrived.set()


def _read_in(source: Source, slot: _Slot, shards: Shards, stream: torch.Stream | None) -> None:
    """Files into a slot, through pinned memory where the device is an accelerator."""
    if slot.staging is not None and slot.copied is not None:
        slot.copied.synchronize()  # the last copy out of the pinned memory
    target = slot.buffer if slot.staging is None else slot.staging
    for offset, extent in source.extents:
        shards.read_bytes(extent, bytes_of(target[offset : offset + extent.size_bytes]))
    if slot.staging is not None and stream is not None:
        _copy_in(slot.staging, slot, source.size_bytes, stream)
