"""Measured bytes of each component of the ledger, at every moment: live storages, followed through a dispatch mode.

Why: an allocator knows how much is in use, not what for. How: torch shows the mode every operator; a storage among its
results that was not seen before is counted for whoever made it (`base.owners`), until a weak reference says that its
last view is gone. Views share a storage, in-place operators and `out=` make none. What the run holds all through is
registered before (`training.memory.static_tensors`), gradients are handed over by backward, and what nobody tagged is
an activation. OTHER is what was there before and belongs to no component.
Threads: torch hands modes and tags to the threads in which an accelerator's backward runs.
Not seen: what a kernel takes and gives back inside. On the simulated accelerator the total is its own, to the byte.
Source of weak references to storages: torch.distributed._tools.mem_tracker. Imported by: profiler, simulate.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit.base.owners import current_owner, listening
from qlora_kit.planning.comparison import OTHER
from qlora_kit.planning.components import COMPONENTS
from qlora_kit.profiling.simulated_memory import Allocation, rounded
from qlora_kit.profiling.simulated_tensor import DeviceTensor, SimulatedDevice

NAMES = (*COMPONENTS, OTHER)
UNTAGGED = "activations"
Bytes = tuple[int, ...]  # one figure for each of NAMES


@dataclass(frozen=True)
class Place:
    """A part of a step: `Place("backward", 3)` is the backward of decoder block 3."""

    part: str
    block: int | None = None

    def __str__(self) -> str:
        return self.part if self.block is None else f"{self.part} of block {self.block}"


@dataclass
class Series:
    """What was in use, each time that it changed.

    Attributes:
        seconds, operators: since the start, when; `bytes`: how much then, by NAMES.
        marks: (index of the entry with which it begins, part of the step).
    """

    seconds: list[float] = field(default_factory=list)
    operators: list[int] = field(default_factory=list)
    bytes: list[Bytes] = field(default_factory=list)
    marks: list[tuple[int, Place]] = field(default_factory=list)


@dataclass
class _Held:
    """One storage: whose it is, bytes asked for and taken, and what tells of its end."""

    component: str
    size_bytes: int
    taken_bytes: int
    reference: weakref.ref[Any]


class Tracker(TorchDispatchMode):
    """Counts within `with Tracker(device, static_tensors(run)) as tracker: ...`; one at a time in a process.

    Args:
        device: whose memory is followed.
        static: (component, tensor) of what is there already.
    Attributes:
        live: bytes in use now by NAMES; `runtime` is what the allocator rounds up to 512.
        total_bytes: their sum.
        peak_bytes, peak, peak_place: the highest total so far, `live` at that time, and when.
        failed: `live` when an allocation was refused.
        series: the same over time.
    """

    def __init__(self, device: torch.device, static: Iterable[tuple[str, Tensor]] = ()) -> None:
        super().__init__()
        self.device = device
        self.live = dict.fromkeys(NAMES, 0)
        self.total_bytes = self.peak_bytes = self.operators = 0
        self.peak = dict(self.live)
        self.failed: dict[str, int] | None = None
        self.place = self.peak_place = Place("start")
        self.series, self._started, self._changed = Series(), time.monotonic(), False
        self._held: dict[int, _Held] = {}
        self._lock = threading.RLock()  # storages die in whatever thread drops them
        simulated = SimulatedDevice.active
        for allocation in simulated.allocations() if simulated is not None else ():
            self._enter(allocation, *_sizes(allocation), OTHER)
        for component, tensor in static:
            self.hand_over(component, [tensor])
        self._record()

    def __enter__(self) -> Tracker:
        self._listening = listening(self)
        self._listening.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._listening.__exit__(*error)
        self._held.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            result = func(*args, **kwargs)
        except torch.OutOfMemoryError:
            self.failed = dict(self.live)
            raise
        self.operators += 1
        self._see(args, OTHER)
        self._see(tuple(kwargs.values()), OTHER)
        self._see(result, current_owner() or UNTAGGED)
        self._record()
        return result

    def hand_over(self, component: str, tensors: Iterable[Tensor | None]) -> None:
        """Give the storages of these tensors to a component; see `base.owners`."""
        for tensor in tensors:
            if tensor is not None:
                held = self._see(tensor, component)
                if held is not None and held.component != component:
                    with self._lock:
                        self._count(held, -1)
                        held.component = component
                        self._count(held, 1)

    def mark(self, part: str, block: int | None) -> None:
        """The next part of a step begins; see `base.owners`."""
        self._record()
        self.place = Place(part, block)
        self.series.marks.append((len(self.series.bytes) - 1, self.place))

    def _see(self, value: Any, component: str) -> _Held | None:
        """Count the storages of a result, or of arguments, that are new; of a single tensor, what is known of it."""
        if isinstance(value, (list, tuple)):
            for item in value:
                self._see(item, component)
        if not isinstance(value, Tensor) or value.device.type != self.device.type:
            return None
        if isinstance(value, DeviceTensor):
            memory: Any = value.allocation
            return None if memory is None else self._enter(memory, *_sizes(memory), component)
        memory = value.untyped_storage()
        size_bytes = memory.nbytes()
        taken_bytes = size_bytes if self.device.type == "cpu" else rounded(size_bytes)
        return self._enter(memory, size_bytes, taken_bytes, component) if size_bytes else None

    def _enter(self, memory: Any, size_bytes: int, taken_bytes: int, component: str) -> _Held:
        key = id(memory)  # of an object that torch keeps for as long as the memory
        with self._lock:
            held = self._held.get(key)
            if held is None:
                reference = weakref.ref(memory, lambda _: self._died(key))
                held = self._held[key] = _Held(component, size_bytes, taken_bytes, reference)
                self._count(held, 1)
            elif held.size_bytes != size_bytes:
                self._count(held, -1)
                held.size_bytes, held.taken_bytes = size_bytes, taken_bytes
                self._count(held, 1)
        return held

    def _died(self, key: int) -> None:
        with self._lock:
            self._count(self._held.pop(key), -1)

    def _count(self, held: _Held, sign: int) -> None:
        self.live[held.component] += sign * held.size_bytes
        self.live["runtime"] += sign * (held.taken_bytes - held.size_bytes)
        self.total_bytes += sign * held.taken_bytes
        self._changed = True

    def _record(self) -> None:
        """Keep what is in use now, if it is not what it was."""
        if not self._changed:
            return
        self._changed = False
        if self.total_bytes > self.peak_bytes:
            self.peak_bytes, self.peak, self.peak_place = self.total_bytes, dict(self.live), self.place
        self.series.seconds.append(time.monotonic() - self._started)
        self.series.operators.append(self.operators)
        self.series.bytes.append(tuple(self.live.values()))


def _sizes(allocation: Allocation) -> tuple[int, int]:
    """Bytes asked for and taken of an allocation on the simulated accelerator."""
    return allocation.storages[-1].nbytes(), allocation.size_bytes
