"""Where offloaded inputs go: pinned host memory beside an accelerator, or a file without a name.

How: a `Place` says what of a slab or file is one input's. A tier starts moves (`send` from `place.tensor`, `fetch` into
it), and `wait` orders what the caller does next after the last move of a place. Host memory: one stream copies both
ways, ordered by events against the stream that computes; the host never waits. File: a thread writes and reads raw
bytes, one input after the other, through pinned memory where the device is an accelerator; pages that the kernel keeps
of the file are given back as soon as they are written, since they count against a limit on the process' memory.
Imported by: training.offload, which says how much memory all this takes.
"""

from __future__ import annotations

import bisect
import errno
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from qlora_kit.base.shards import bytes_of
from qlora_kit.files import scratch_file

SLAB_INPUTS = 4  # that a slab of pinned memory has room for, at least: torch takes powers of two
PAGE_BYTES = 4096


class Space:
    """Which bytes of a slab or file are free: the first range that is large enough is given; neighbours become one."""

    def __init__(self, size_bytes: int) -> None:
        self.free = [(0, size_bytes)]  # (start, end), in order

    def lend(self, place: Place) -> bool:
        """Give a place its range; False: there is none."""
        for i, (start, end) in enumerate(self.free):
            rest = start + place.room_bytes
            if rest <= end:
                self.free[i : i + 1] = [(rest, end)] if rest < end else []
                place.space, place.start = self, start
                return True
        return False

    def take_back(self, place: Place) -> None:
        """Let others have the range of a place."""
        start, end = place.start, place.start + place.room_bytes
        i = bisect.bisect(self.free, (start, end))
        if i < len(self.free) and self.free[i][0] == end:
            end = self.free.pop(i)[1]
        if i and self.free[i - 1][1] == start:
            i -= 1
            start = self.free.pop(i)[0]
        self.free.insert(i, (start, end))


class Place:
    """Where a kept tensor is.

    Attributes:
        tensor: on the device, there or arriving; None: it is only away.
        room_bytes: what it takes of a slab or file.
        space, start: which range there is its own.
        host: the tensor in that range of a slab.
        ready: event on the compute stream: `tensor` may be copied from, or into.
        moved: the last move is done: an event on the copy stream, or one that the thread sets.
        failure: of the thread.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.shape, self.dtype, self.size_bytes = tensor.shape, tensor.dtype, tensor.nbytes
        self.room_bytes = -(-self.size_bytes // PAGE_BYTES) * PAGE_BYTES
        self.space: Space | None = None
        self.start = 0
        self.host: Tensor | None = None
        self.ready: Any = None
        self.moved: Any = None
        self.failure: BaseException | None = None

    def lay_on(self, memory: Tensor) -> Tensor:
        """The first bytes of uint8 memory as a tensor like the kept one."""
        return memory[: self.size_bytes].view(self.dtype).view(self.shape)


class PinnedMemory:
    """Host memory beside an accelerator, in slabs.

    A range that is given back may still be read by a copy: the next copy into it comes after, on the same stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, torch.Stream(device=device)
        self._slabs: list[tuple[Space, Tensor]] = []

    @property
    def size_bytes(self) -> int:
        return sum(slab.numel() for _, slab in self._slabs)

    def send(self, place: Place) -> None:
        place.host = place.lay_on(self._room(place))
        self._copy(place, place.host, place.tensor)

    def fetch(self, place: Place) -> None:
        self._copy(place, place.tensor, place.host)

    def wait(self, place: Place) -> None:
        torch.accelerator.current_stream(self._device).wait_event(place.moved)

    def close(self) -> None:
        self._copies.synchronize()  # the store's tensors are freed now

    def _copy(self, place: Place, target: Tensor | None, source: Tensor | None) -> None:
        assert target is not None and source is not None
        self._copies.wait_event(torch.accelerator.current_stream(self._device).record_event())
        with self._copies:
            target.copy_(source, non_blocking=True)
            place.moved = self._copies.record_event()

    def _room(self, place: Place) -> Tensor:
        """Give the place a range of a slab; of a new one if none has one."""
        for space, slab in self._slabs:
            if space.lend(place):
                return slab[place.start :]
        size_bytes = 1 << (SLAB_INPUTS * place.room_bytes - 1).bit_length()
        self._slabs.append((Space(size_bytes), torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)))
        return self._room(place)


class ScratchFile:
    """A file without a name, and the thread that writes and reads it, one input after the other."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._device, self._space, self._file = device, Space(1 << 62), scratch_file(folder)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        worker = (self._jobs, self._file, None if device.type == "cpu" else _Staging(device))
        threading.Thread(target=_move_inputs, args=worker, name="qlora_kit input mover", daemon=True).start()

    @property
    def size_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def send(self, place: Place) -> None:
        self._space.lend(place)
        self._start(_write, place)

    def fetch(self, place: Place) -> None:
        self._start(_read, place)

    def wait(self, place: Place) -> None:
        place.moved.wait()

    def close(self) -> None:
        self._jobs.put(None)

    def _start(self, move: _Move, place: Place) -> None:
        if self._device.type != "cpu":
            place.ready = torch.accelerator.current_stream(self._device).record_event()
        place.moved = threading.Event()
        self._jobs.put((move, place))


class _Staging:
    """Pinned memory of one input, and the stream on which the thread copies through it."""

    def __init__(self, device: torch.device) -> None:
        self.copies, self._memory = torch.Stream(device=device), torch.empty(0, dtype=torch.uint8)

    def of(self, place: Place) -> Tensor:
        """The memory as a tensor like the kept one; what was in it is lost."""
        if self._memory.numel() < place.size_bytes:
            self._memory = torch.empty(place.size_bytes, dtype=torch.uint8, pin_memory=True)
        return place.lay_on(self._memory)

    def copy(self, place: Place, target: Tensor, source: Tensor) -> None:
        """Copy once the place is ready, and wait until it is done."""
        self.copies.wait_event(place.ready)
        with self.copies:
            target.copy_(source)


_Move = Callable[[int, Place, _Staging | None], None]
_Job = tuple[_Move, Place]


def _move_inputs(jobs: queue.SimpleQueue[_Job | None], file: IO[bytes], staging: _Staging | None) -> None:
    """The thread. It holds no reference to the store, so that a store that is let go of ends it, and the file."""
    with file:
        while (job := jobs.get()) is not None:
            move, place = job
            try:
                move(file.fileno(), place, staging)
            except BaseException as failure:  # raised where the input is needed
                place.failure = failure.with_traceback(None)  # whose frames hold tensors
            place.moved.set()
            del job, move, place


def _write(file: int, place: Place, staging: _Staging | None) -> None:
    assert place.tensor is not None
    host = place.tensor
    if staging is not None:
        host = staging.of(place)
        staging.copy(place, host, place.tensor)
    _all_bytes(os.pwritev, file, host, place.start)


def _read(file: int, place: Place, staging: _Staging | None) -> None:
    assert place.tensor is not None
    host = place.tensor if staging is None else staging.of(place)
    _all_bytes(os.preadv, file, host, place.start)
    if staging is not None:
        staging.copy(place, place.tensor, host)


def _all_bytes(call: Callable[[int, list[memoryview], int], int], file: int, host: Tensor, start: int) -> None:
    """Read or write a whole tensor; one call may do less. The file's pages are not to stay in memory."""
    data, done = bytes_of(host.view(-1).view(torch.uint8)), 0
    while done < len(data):
        count = call(file, [data[done:]], start + done)
        if count == 0:
            raise OSError(errno.EIO, "the file ends too early")
        done += count
    if hasattr(os, "posix_fadvise"):  # drops what is written, begins to write what is not
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
