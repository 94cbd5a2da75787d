"""torch.Stream, torch.Event and torch.Generator of the simulated accelerator.

Why: torch's Python back end has none of them (its streams are all the default stream, its events do nothing, a
generator cannot be made). These take their place in torch while a simulated device is active; for other devices they
make torch's own. What waiting means: `simulated_timeline`.
Imported by: simulated_tensor, simulated_device.
"""

from __future__ import annotations

import time
import weakref
from typing import Any

import torch
from torch import Event as _TorchEvent
from torch import Generator as _TorchGenerator
from torch import Stream as _TorchStream

from qlora_kit.profiling.simulated_timeline import Clock, Lane, Timeline

NAME = "simgpu"
_DEVICE_TYPE = torch._C._autograd.DeviceType.PrivateUse1.value  # type: ignore[attr-defined]
_STACK = "qlora_kit.simulated.streams"  # one of torch's thread-local objects: backward runs on its caller's stream


def _is_elsewhere(device: Any) -> bool:
    return device is not None and torch.device(device).type != NAME


class _StandIn(type(_TorchGenerator)):  # type: ignore[misc]
    """Of a class that takes the place of its base in torch: the base's own objects are instances too."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.__bases__[0])


class Stream(_TorchStream, metaclass=_StandIn):
    """Stands in for torch.Stream.

    Attributes:
        active: of the device that is active now, for `torch.Stream(device=...)`.
    """

    active: Timeline | None = None
    timeline: Timeline
    lane: Lane
    entered: bool

    def __new__(cls, device: Any = None, *, priority: int = 0) -> Any:
        if _is_elsewhere(device):
            return _TorchStream(device=device, priority=priority)
        timeline = active_timeline()
        return cls.of(timeline, timeline.new_lane())

    @classmethod
    def of(cls, timeline: Timeline, lane: Lane) -> Stream:
        """The stream of a lane."""
        self = super().__new__(cls, stream_id=lane.stream_id, device_index=0, device_type=_DEVICE_TYPE)  # type: ignore[call-arg]
        self.timeline, self.lane, self.entered = timeline, lane, False
        return self

    def record_event(self, event: Any = None) -> Any:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Any) -> None:
        self.lane.wait(event.clock)

    def wait_stream(self, stream: Any) -> None:
        self.lane.wait(stream.lane.snapshot())

    def synchronize(self) -> None:
        self.timeline.host_learns(self.lane.snapshot())

    def query(self) -> bool:
        """True: asking is waiting here."""
        self.synchronize()
        return True

    def __enter__(self) -> Stream:
        """Raises: RuntimeError: the object is entered already, here or in another thread; older torch refuses that."""
        if self.entered:
            raise RuntimeError(
                "Stream's context should not be initialized: two `with` blocks of one torch.Stream object"
            )
        self.entered = True
        torch._C._stash_obj_in_tls(_STACK, (*_stack(), self))
        return self

    def __exit__(self, *problem: object) -> None:
        self.entered = False
        torch._C._stash_obj_in_tls(_STACK, _stack()[:-1])


class Event(_TorchEvent, metaclass=_StandIn):
    """Stands in for torch.Event. One that was never recorded is done, as on CUDA."""

    clock: Clock
    recorded_s: float

    def __new__(cls, device: Any = None, **options: Any) -> Any:
        if _is_elsewhere(device):
            return _TorchEvent(device=device, **options)
        self = super().__new__(cls, device=NAME, **options)
        self.clock, self.recorded_s = {}, 0.0
        return self

    def record(self, stream: Any = None) -> None:
        stream = current_stream() if stream is None else stream
        self.clock, self.recorded_s = stream.lane.snapshot(), time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        (current_stream() if stream is None else stream).wait_event(self)

    def synchronize(self) -> None:
        active_timeline().host_learns(self.clock)

    def query(self) -> bool:
        """True: asking is waiting here."""
        self.synchronize()
        return True

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds, of the host's clock."""
        return (end_event.recorded_s - self.recorded_s) * 1e3


class Generator(_TorchGenerator, metaclass=_StandIn):
    """Stands in for torch.Generator. It draws the CPU's numbers."""

    made: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # kernels are given plain ones

    def __new__(cls, device: Any = "cpu") -> Any:
        if _is_elsewhere(device):
            return _TorchGenerator(device)
        self: Any = super().__new__(cls, device="cpu")  # type: ignore[call-arg]
        cls.made[self._cdata] = self
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(NAME, 0)


def is_host_generator(value: Any) -> bool:
    """Whether `value` is a generator that kernels of the simulated device must not use."""
    return isinstance(value, _TorchGenerator) and value._cdata not in Generator.made  # type: ignore[attr-defined]


def active_timeline() -> Timeline:
    """Raises: RuntimeError: no simulated device is active."""
    if Stream.active is None:
        raise RuntimeError("no simulated device is active")
    return Stream.active


def current_lane() -> Lane:
    """Of the stream that this thread issues work on."""
    stack, timeline = _stack(), active_timeline()
    return stack[-1].lane if stack and stack[-1].timeline is timeline else timeline.default


def current_stream(device: Any = None) -> Stream:
    """Stands in for torch.accelerator.current_stream."""
    return Stream.of(active_timeline(), current_lane())


def set_stream(stream: Stream | None) -> None:
    """Stands in for torch.accelerator.set_stream; None: back to the default stream."""
    torch._C._stash_obj_in_tls(_STACK, () if stream is None else (stream,))


def _stack() -> tuple[Stream, ...]:
    return torch._C._get_obj_in_tls(_STACK) if torch._C._is_key_in_tls(_STACK) else ()
