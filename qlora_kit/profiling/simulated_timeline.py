"""What is ordered after what on the simulated accelerator: copies that land late, and an error where nothing orders.

Why: code that forgets to wait works on the machine where it is written and fails elsewhere, now and then.
How: the work of every stream is numbered. A stream knows, of each other one, up to which number its work is done: that
is what `wait_event` hands over, and what the host learns when it synchronizes (vector clocks: Fidge 1988, Mattern
1989). Every use of memory, by byte range, is checked against that, so a race is found whether or not it would strike.
Kernels compute at once, in the order of the host. A non-blocking copy is late instead: it lands at the first use that
is ordered after it, and until then its destination holds poison (NaN, or bytes of 0xAA).

Found:
- a stream uses memory that another one, not waited for, may still be writing, or writes what it may still be reading:
  a copy that was not waited for; a slot given to the next copy while kernels of the last one may run;
- freed memory is handed out again while a stream that did not allocate it, and was neither waited for nor named by
  `record_stream`, may still use it;
- a pinned buffer is written by the host or another copy before its copy is known to be done.
Not found: the host reads the result of a copy to the host too early. It reads poison.
Imported by: simulated_streams, simulated_tensor.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora_kit.profiling.simulated_memory import Allocation

POISON_BYTE = 0xAA
SMALL_POOL_BYTES = 1 << 20  # CUDA's allocator keeps requests up to this size apart from larger ones
Clock = dict[int, int]  # stream id -> number of its last work that is known to be done
_ids = itertools.count(1)


class DeviceRaceError(RuntimeError):
    """Two uses of the same memory that nothing orders: on a GPU the result would depend on luck."""


@dataclass(eq=False)
class Lane:
    """The order of one stream.

    Attributes:
        number: of the work last issued.
        clock: what of other streams is done before anything that is issued from now on.
    """

    stream_id: int = field(default_factory=lambda: next(_ids))
    number: int = 0
    clock: Clock = field(default_factory=dict)

    def snapshot(self) -> Clock:
        """All that is done once the work issued so far is."""
        return {**self.clock, self.stream_id: self.number}

    def wait(self, clock: Clock) -> None:
        """What is issued from now on runs after `clock`."""
        for stream_id, number in clock.items():
            self.clock[stream_id] = max(number, self.clock.get(stream_id, 0))


@dataclass(eq=False)
class History:
    """Who used an allocation.

    Attributes:
        stream_id: of the stream that it was allocated on, whose next allocations may take its place.
        uses: (first byte, end, stream, whether it wrote) -> number of the last such work.
        recorded: streams named by `record_stream`.
        pending: copies into it that have not landed, in order.
    """

    stream_id: int
    uses: dict[tuple[int, int, int, bool], int] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)
    pending: list[Copy] = field(default_factory=list)


@dataclass(eq=False)
class Copy:
    """A non-blocking copy.

    Attributes:
        host: the pinned end.
        data: what the source held when the copy was issued.
        target: the end on the device; None: the copy goes to the host.
        history: of the end on the device.
    """

    stream_id: int
    number: int
    host: Tensor
    data: Tensor
    target: Tensor | None
    history: History
    landed: bool = False


@dataclass(frozen=True, eq=False)
class _Grave:
    """Memory that was freed while other streams may use it."""

    size_bytes: int
    owner: str
    uses: Clock
    history: History


def poison(tensor: Tensor) -> None:
    """Fill with what no correct result contains."""
    if tensor.is_meta or tensor.dtype == torch.bool:
        return
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
        return
    pattern = bytes([POISON_BYTE]) * tensor.element_size()
    tensor.fill_(int.from_bytes(pattern, "little", signed=tensor.dtype.is_signed))


def byte_range(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor within its storage, and the one after its last."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return start, start + int(last + 1) * tensor.element_size()


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _same_memory(one: Tensor, other: Tensor) -> bool:
    same = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return same and _overlap(byte_range(one), byte_range(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


class Timeline:
    """The order of all streams of one device, and the check of every use of its memory.

    Args:
        on_race: "raise" an error, or "poison": go on, and let what was not waited for hold poison.
    """

    def __init__(self, on_race: str) -> None:
        if on_race not in ("raise", "poison"):
            raise ValueError(f'on_race: {on_race!r}, expected "raise" or "poison"')
        self.on_race, self.lanes = on_race, [Lane()]
        self._host: Clock = {}
        self._in_flight: list[Copy] = []  # until the host knows that they are done
        self._graves: list[_Grave] = []
        self._lock = threading.RLock()

    @property
    def default(self) -> Lane:
        """The lane of the default stream."""
        return self.lanes[0]

    def new_lane(self) -> Lane:
        """One that waits for nothing, not even for the default stream."""
        self.lanes.append(Lane())
        return self.lanes[-1]

    def known(self, lane: Lane, other: int, number: int) -> bool:
        """Whether what is issued on `lane` now runs after work `number` of the stream `other`."""
        return other == lane.stream_id or number <= max(lane.clock.get(other, 0), self._host.get(other, 0))

    def use(self, history: History, span: tuple[int, int], lane: Lane, writes: bool, what: object) -> None:
        """One use of a range of bytes by the work last issued on `lane`; copies that are ordered before it land.

        Raises: DeviceRaceError.
        """
        with self._lock:
            uses = history.uses
            for (start, end, other, wrote), number in list(uses.items()):
                if (writes or wrote) and _overlap(span, (start, end)) and not self.known(lane, other, number):
                    self._race(
                        f"{what}, on stream {lane.stream_id}, {'writes' if writes else 'reads'} memory that stream "
                        f"{other} may still be {'writing' if wrote else 'reading'}: let it wait for an event that was "
                        "recorded there"
                    )
            for copy in [copy for copy in history.pending if self.known(lane, copy.stream_id, copy.number)]:
                if copy.target is not None and _overlap(span, byte_range(copy.target)):
                    self._land(copy)
            for key in [key for key in uses if span[0] <= key[0] and key[1] <= span[1]]:
                # Whoever is ordered after this write is ordered after what it was ordered after itself.
                if writes or key[2:] == (lane.stream_id, False):
                    del uses[key]
            uses[(*span, lane.stream_id, writes)] = lane.number

    def allocated(self, lane: Lane, size_bytes: int) -> History:
        """The history of new memory. Raises: DeviceRaceError: it may be memory that was freed too early."""
        with self._lock:
            self._graves = [g for g in self._graves if not all(self.known(lane, *use) for use in g.uses.items())]
            for grave in [grave for grave in self._graves if grave.history.stream_id == lane.stream_id]:
                if (grave.size_bytes <= SMALL_POOL_BYTES) != (size_bytes <= SMALL_POOL_BYTES):
                    continue
                self._graves.remove(grave)
                for copy in self._in_flight:
                    if copy.target is None and copy.history is grave.history:
                        poison(copy.data)
                self._race(
                    f"{size_bytes} bytes allocated on stream {lane.stream_id} may take the place of {grave.size_bytes} "
                    f"freed ones{f' of {grave.owner!r}' if grave.owner else ''} that stream {next(iter(grave.uses))} "
                    "may still be using: tensor.record_stream(stream) before it is freed, or wait for that stream"
                )
            return History(lane.stream_id, {(0, size_bytes, lane.stream_id, True): lane.number})

    def freed(self, allocation: Allocation) -> None:
        """Remember who may still be using what is given back now."""
        history: History = allocation.history
        with self._lock:
            uses: Clock = {}
            for (_, _, other, _), number in history.uses.items():
                if other != history.stream_id and other not in history.recorded:
                    uses[other] = max(number, uses.get(other, 0))
            if uses:
                self._graves.append(_Grave(allocation.size_bytes, allocation.owner, uses, history))

    def copy_to_device(self, source: Tensor, target: Tensor, history: History, lane: Lane) -> None:
        """Issue a late copy from pinned memory; the target's `use` was called. Raises: DeviceRaceError."""
        with self._lock:
            self.meet_on_host(source, lane, writes=False)
            data = source if target.is_meta else source.clone()
            poison(target)
            copy = Copy(lane.stream_id, lane.number, source, data, target, history)
            history.pending.append(copy)
            self._in_flight.append(copy)

    def copy_to_host(self, target: Tensor, source: Tensor, history: History, lane: Lane) -> None:
        """Issue a late copy into pinned memory; the source's `use` was called. Raises: DeviceRaceError."""
        with self._lock:
            self.meet_on_host(target, lane, writes=True)
            data = source if source.is_meta else source.clone()
            if not source.is_meta:
                poison(target)
            self._in_flight.append(Copy(lane.stream_id, lane.number, target, data, None, history))

    def meet_on_host(self, host: Tensor, lane: Lane, writes: bool) -> None:
        """Order a copy on `lane` after the late ones of the same host memory. Raises: DeviceRaceError."""
        with self._lock:
            for copy in [copy for copy in self._in_flight if _same_memory(copy.host, host)]:
                self._check_source(copy)
                if copy.target is not None and not writes:
                    continue  # two copies may read the same bytes
                if self.known(lane, copy.stream_id, copy.number):
                    self._land(copy)
                    self._in_flight.remove(copy)
                else:
                    self._race(
                        f"a copy on stream {lane.stream_id} uses pinned memory that a copy on stream {copy.stream_id} "
                        "may still be using: let it wait for an event that was recorded there"
                    )

    def host_learns(self, clock: Clock) -> None:
        """The host waited until all of `clock` was done. Raises: DeviceRaceError."""
        with self._lock:
            for stream_id, number in clock.items():
                self._host[stream_id] = max(number, self._host.get(stream_id, 0))
            done = [copy for copy in self._in_flight if copy.number <= self._host.get(copy.stream_id, 0)]
            self._in_flight = [copy for copy in self._in_flight if copy not in done]
            for copy in done:
                self._land(copy)
                self._check_source(copy)

    def synchronize(self) -> None:
        """The host waits for all streams. Raises: DeviceRaceError."""
        self.host_learns({lane.stream_id: lane.number for lane in self.lanes})

    def _land(self, copy: Copy) -> None:
        """Let a copy happen, and before it those that were issued before it into the same memory."""
        if copy.target is None:
            if not copy.landed and not copy.data.is_meta:
                copy.host.copy_(copy.data)
            copy.landed = True
        while not copy.landed:
            first = copy.history.pending.pop(0)
            first.landed = True
            if first.target is not None and not first.target.is_meta:
                self._check_source(first)
                first.target.copy_(first.host)

    def _check_source(self, copy: Copy) -> None:
        if copy.target is None or copy.target.is_meta or torch.equal(_bytes(copy.host), _bytes(copy.data)):
            return
        self._race(
            f"the pinned source of a copy on stream {copy.stream_id} was overwritten before the host knew that it "
            "was done: event.synchronize() first"
        )

    def _race(self, message: str) -> None:
        if self.on_race == "raise":
            raise DeviceRaceError(f"simgpu: {message}")
