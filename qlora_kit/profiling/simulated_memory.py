"""The memory of the simulated accelerator: a hard limit, bytes exact per storage, who holds what.

How: an `Allocation` stands for one storage and dies with the last tensor that views it; sizes are rounded up to 512
bytes as CUDA's caching allocator does. Not simulated: that allocator's own slack (fragmentation, blocks of 2 and
20 MiB kept for later), workspaces inside a kernel, the 300-600 MiB of a CUDA context.
Imported by: simulated_timeline, simulated_tensor, tracker.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from qlora_kit.base.owners import current_owner

ROUND_BYTES = 512  # kMinBlockSize of c10/cuda/CUDACachingAllocator.cpp


class Allocation:
    """The device memory of one storage; it lives as long as some tensor views that storage.

    Attributes:
        size_bytes: taken from the limit, a multiple of 512.
        owner: tag of the block that it was made in (`base.owners`).
        history: which streams used it, and how: `simulated_timeline.History`.
    """

    def __init__(self, memory: Memory, size_bytes: int, history: Any = None) -> None:
        self.memory, self.owner, self.history = memory, current_owner(), history
        self.storages: list[torch.UntypedStorage] = []  # kept, so that no other storage gets their address
        self.size_bytes = 0  # all that an allocation which is refused gives back
        memory.take(size_bytes)
        self.size_bytes = size_bytes

    def __del__(self) -> None:
        self.memory.give_back(self)


class Memory:
    """Bytes in use on one device.

    Attributes:
        limit_bytes: the most that may be in use at once; None: no limit.
        live_bytes, peak_bytes: in use now, and at most since the start or `reset_peak`.
    """

    def __init__(self, limit_bytes: int | None, on_death: Callable[[Allocation], None]) -> None:
        self.limit_bytes, self.live_bytes, self.peak_bytes = limit_bytes, 0, 0
        self._on_death = on_death
        self._lock = threading.RLock()  # allocations die in whatever thread drops them
        self._by_storage: weakref.WeakValueDictionary[int, Allocation] = weakref.WeakValueDictionary()

    def allocations(self) -> list[Allocation]:
        """What is in use now."""
        return list({id(allocation): allocation for allocation in self._by_storage.values()}.values())

    def find(self, storage: torch.UntypedStorage) -> Allocation | None:
        """The allocation that `storage` stands for, if some device tensor views it."""
        return self._by_storage.get(storage._cdata)

    def enter(self, storage: torch.UntypedStorage, allocation: Allocation) -> None:
        """Say that `storage` stands for `allocation`."""
        allocation.storages.append(storage)
        self._by_storage[storage._cdata] = allocation

    def take(self, size_bytes: int) -> None:
        """Count `size_bytes` more. Raises: torch.OutOfMemoryError: the limit."""
        with self._lock:
            if self.limit_bytes is not None and self.live_bytes + size_bytes > self.limit_bytes:
                raise torch.OutOfMemoryError(
                    f"simgpu out of memory: asked for {size_bytes} bytes; {self.live_bytes} of {self.limit_bytes} "
                    f"are in use, {self.limit_bytes - self.live_bytes} free"
                )
            self.live_bytes += size_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def give_back(self, allocation: Allocation) -> None:
        """Called when an allocation dies."""
        with self._lock:
            self.live_bytes -= allocation.size_bytes
        if allocation.size_bytes:
            self._on_death(allocation)

    def resize(self, allocation: Allocation, size_bytes: int) -> None:
        """Change the size of an allocation. Raises: torch.OutOfMemoryError."""
        self.take(size_bytes - allocation.size_bytes)
        allocation.size_bytes = size_bytes

    def adopt(self, allocation: Allocation, history: Any) -> None:
        """Take over what was made on a device that is closed: tables that libraries cache for the process."""
        self.take(allocation.size_bytes)
        with allocation.memory._lock:
            allocation.memory.live_bytes -= allocation.size_bytes
        allocation.memory, allocation.history = self, history
        for storage in allocation.storages:
            self._by_storage[storage._cdata] = allocation


def rounded(size_bytes: int) -> int:
    """What CUDA's caching allocator counts for a request of `size_bytes`."""
    return -(-size_bytes // ROUND_BYTES) * ROUND_BYTES
