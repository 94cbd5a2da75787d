"""The simulated accelerator's tensors, and how a kernel runs on them.

How: `__torch_dispatch__` exchanges each `DeviceTensor` for its `plain` one, calls the kernel of the CPU or of meta, and
wraps what comes back. On the way it refuses host tensors where CUDA would, counts the bytes of new storages, tells
the timeline which memory is read and written, and makes non-blocking copies late.
Imported by: simulated_device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_kit.profiling.simulated_kernels import HOST_INDICES, LACKING, SHAPES_ONLY, WAITS, keeps_values, schema_of
from qlora_kit.profiling.simulated_memory import Allocation, Memory, rounded
from qlora_kit.profiling.simulated_streams import NAME, current_lane, is_host_generator
from qlora_kit.profiling.simulated_timeline import Lane, Timeline, byte_range

aten = torch.ops.aten
DEVICE: Any = f"{NAME}:0"
_data: Any = torch._C.TensorBase.data


class SimulatedDevice:
    """The device, from the start to the end of a `simulated_device` block.

    Attributes:
        active: the one that is active now.
        shapes_only: tensors have shapes and bytes, but no values (but see `simulated_kernels.keeps_values`).
        memory, timeline: its bytes, and the order of its streams.
        peak_pinned_bytes: the most host memory that was pinned at once since the start or `reset_peak`.
    """

    active: SimulatedDevice | None = None

    def __init__(self, limit_bytes: int | None, shapes_only: bool, on_race: str) -> None:
        self.shapes_only, self.timeline = shapes_only, Timeline(on_race)
        self.memory = Memory(limit_bytes, self.timeline.freed)
        self._pinned: dict[int, tuple[StorageWeakRef, int]] = {}  # by address of the storage: is it alive, bytes
        self.peak_pinned_bytes = 0
        self._error: Exception | None = None

    @property
    def live_bytes(self) -> int:
        """In use now, each storage rounded up to 512."""
        return self.memory.live_bytes

    @property
    def peak_bytes(self) -> int:
        """The most in use at once since the start or `reset_peak`."""
        return self.memory.peak_bytes

    @property
    def limit_bytes(self) -> int | None:
        """More in use raises torch.OutOfMemoryError; None: no limit. May be set."""
        return self.memory.limit_bytes

    @limit_bytes.setter
    def limit_bytes(self, limit_bytes: int | None) -> None:
        self.memory.limit_bytes = limit_bytes

    def reset_peak(self) -> None:
        """Begin a new measurement of `peak_bytes` and `peak_pinned_bytes`."""
        self.memory.peak_bytes, self.peak_pinned_bytes = self.memory.live_bytes, self.pinned_bytes

    def allocations(self) -> list[Allocation]:
        """What is in use now, each with its `size_bytes` and `owner`."""
        return self.memory.allocations()

    def bytes_by_owner(self) -> dict[str, int]:
        """Bytes in use now by tag of `owner`; their sum is `live_bytes`."""
        held: dict[str, int] = {}
        for allocation in self.allocations():
            held[allocation.owner] = held.get(allocation.owner, 0) + allocation.size_bytes
        return held

    @property
    def pinned_bytes(self) -> int:
        """Of host memory that is pinned now, each allocation rounded up to a power of two as CUDA's are."""
        return sum(size_bytes for reference, size_bytes in self._pinned.values() if not reference.expired())

    def is_pinned(self, host: Tensor) -> bool:
        """Whether a host tensor lies in memory that `pin` declared."""
        seen = self._pinned.get(host.untyped_storage()._cdata)
        return seen is not None and not seen[0].expired()

    def pin(self, host: Tensor) -> Tensor:
        """Declare the memory of a host tensor to be pinned, and return it."""
        storage = host.untyped_storage()
        self._pinned = {address: seen for address, seen in self._pinned.items() if not seen[0].expired()}
        taken = 1 << (storage.nbytes() - 1).bit_length() if storage.nbytes() else 0
        self._pinned[storage._cdata] = (StorageWeakRef(storage), taken)
        self.peak_pinned_bytes = max(self.peak_pinned_bytes, self.pinned_bytes)
        return host

    def make(self, make: Callable[[str], Tensor]) -> DeviceTensor:
        """A new tensor of what `make` gives on the CPU, or on meta where values are not wanted."""
        inner = make("meta" if self.shapes_only else "cpu")
        if inner.is_meta and keeps_values(inner.untyped_storage().nbytes(), inner.dtype):
            inner = make("cpu")
        return self.wrap(inner)

    def wrap(self, inner: Tensor) -> DeviceTensor:
        """A device tensor of `inner`; its storage is counted if it is new.

        Raises: torch.OutOfMemoryError: the limit. DeviceRaceError: what was freed here may still be in use.
        """
        storage = inner.untyped_storage()
        size_bytes = rounded(storage.nbytes())
        allocation = self.memory.find(storage)
        if allocation is None and size_bytes:
            if self.shapes_only and not inner.is_meta and not keeps_values(storage.nbytes(), inner.dtype):
                inner = _meta_twin(inner)
                storage = inner.untyped_storage()
            history = self.timeline.allocated(current_lane(), size_bytes)
            allocation = Allocation(self.memory, size_bytes, history)
            self.memory.enter(storage, allocation)
        return DeviceTensor(inner, allocation)

    def check(self, tensor: DeviceTensor) -> None:
        """Take over a tensor of a device that is closed: libraries cache tables for the process.

        Raises: RuntimeError: it has no values, and here values are computed.
        """
        if tensor.plain.is_meta and not self.shapes_only:
            raise RuntimeError(f"{NAME}: a tensor without values, made with shapes_only, is used without it")
        allocation = tensor.allocation
        if allocation is not None and allocation.memory is not self.memory:
            self.memory.adopt(allocation, self.timeline.allocated(self.timeline.default, allocation.size_bytes))

    def use(self, tensor: DeviceTensor, lane: Lane, writes: bool, what: object) -> None:
        """Account for one use of a tensor's memory by the work last issued on `lane`. Raises: DeviceRaceError."""
        if tensor.allocation is not None:
            self.timeline.use(tensor.allocation.history, byte_range(tensor.plain), lane, writes, what)

    def take_error(self) -> Exception | None:
        """A copy of the last error of a kernel, without its traceback; once."""
        error, self._error = self._error, None
        return error


def on_active_device(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`kernel(device, ...)`. Raises: RuntimeError: no device is active; and what the kernel raises."""
    device = SimulatedDevice.active
    if device is None:
        raise RuntimeError(f"{NAME}: no simulated device is active: its tensors are of use within its block only")
    try:
        return kernel(device, *args, **kwargs)
    except Exception as problem:
        device._error = type(problem)(*problem.args)  # the traceback would keep tensors alive
        raise


class DeviceTensor(Tensor):
    """A tensor on the simulated device.

    Attributes:
        plain: its values, on the CPU, or its shape, on meta.
        allocation: the device memory that it views; None: it has no bytes.
    """

    plain: Tensor
    allocation: Allocation | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, allocation: Allocation | None) -> DeviceTensor:
        layout: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        self = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=DEVICE, **layout)
        self.plain, self.allocation = inner, allocation
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return on_active_device(_OTHERWISE.get(func) or functools.partial(run, func), *args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{NAME}({self.plain!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Any = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of `plain`: its size is the device's, and views of one storage share it."""
        return self.plain.untyped_storage()

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return _data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        _data.__set__(self, value)  # shape and dtype; refuses a host tensor
        self.plain, self.allocation = value.plain.detach(), value.allocation  # type: ignore[attr-defined]


def _meta_twin(inner: Tensor) -> Tensor:
    return torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")


# ------------------------------------------------------------------------------------------------ running a kernel


class _Operands:
    """The tensors of one call: collected, then exchanged for their plain ones, then found again in the result."""

    def __init__(self, device: SimulatedDevice, func: Any) -> None:
        self.device, self.func = device, func
        self.tensors: list[tuple[DeviceTensor, bool]] = []  # and whether it is written
        self.by_inner: dict[int, DeviceTensor] = {}
        self.on_meta = False

    def collect(self, value: Any, written: bool, depth: int = 0) -> None:
        """Raises: RuntimeError: a host tensor that is not a single value, or a host generator."""
        if isinstance(value, DeviceTensor):
            self.device.check(value)
            self.tensors.append((value, written))
            self.by_inner[id(value.plain)] = value
            self.on_meta |= value.plain.is_meta
        elif isinstance(value, Tensor):
            if (value.dim() or depth) and not (depth and self.func in HOST_INDICES):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and "
                    f"{value.device}: {self.func} was given a host tensor of shape {tuple(value.shape)}"
                )
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.collect(item, written, depth + 1)
        elif is_host_generator(value):
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{value.device}'")

    def exchanged(self, value: Any, written: bool) -> Any:
        """`value` with its device tensors exchanged; where one has no values, none has."""
        if isinstance(value, DeviceTensor):
            return self._without_values(value, written) if self.on_meta and not value.plain.is_meta else value.plain
        if isinstance(value, Tensor):
            return value.to("meta") if self.on_meta else value
        if isinstance(value, (list, tuple)):
            return type(value)([self.exchanged(item, written) for item in value])
        return value

    def _without_values(self, tensor: DeviceTensor, written: bool) -> Tensor:
        twin = _meta_twin(tensor.plain)
        if written:  # for good
            if tensor.allocation is not None:
                self.device.memory.enter(twin.untyped_storage(), tensor.allocation)
            tensor.plain = twin
            self.by_inner[id(twin)] = tensor
        return twin

    def wrap(self, result: Any) -> Any:
        """The results on the device; those that were written are the arguments themselves."""
        if isinstance(result, (list, tuple)):
            return type(result)([self.wrap(item) for item in result])
        if not isinstance(result, Tensor):
            return result
        tensor = self.by_inner.get(id(result))
        if tensor is None:
            return self.device.wrap(result)
        if tensor.shape != result.shape or tensor.stride() != result.stride():
            self._reshape(tensor)
        return tensor

    def _reshape(self, tensor: DeviceTensor) -> None:
        """Follow a kernel that gave the plain tensor another shape: `resize_`, `squeeze_`, an `out` that grows."""
        size_bytes = rounded(tensor.plain.untyped_storage().nbytes())
        if tensor.allocation is not None and tensor.allocation.size_bytes < size_bytes:
            self.device.memory.resize(tensor.allocation, size_bytes)
        fresh = self.device.wrap(tensor.plain)
        _data.__set__(tensor, fresh)
        tensor.allocation = fresh.allocation


def run(func: Any, device: SimulatedDevice, /, *args: Any, **kwargs: Any) -> Any:
    """Run a kernel on the plain tensors. Raises: RuntimeError, torch.OutOfMemoryError, DeviceRaceError."""
    schema, operands, lane = schema_of(func), _Operands(device, func), current_lane()
    arguments = [*enumerate(args), *kwargs.items()]
    for key, value in arguments:
        operands.collect(value, key in schema.written)
    if not schema.is_view:
        lane.number += 1
        for tensor, written in operands.tensors:
            if written or schema.reads:
                device.use(tensor, lane, written, func)
    where, pinned = kwargs.get("device"), kwargs.pop("pin_memory", None)
    to_host = where is not None and torch.device(where).type != NAME
    if where is not None and not to_host:
        kwargs["device"] = torch.device("meta" if operands.on_meta else "cpu")
    inner_args = [operands.exchanged(value, i in schema.written) for i, value in enumerate(args)]
    inner_kwargs = {name: operands.exchanged(value, name in schema.written) for name, value in kwargs.items()}
    kernel = SHAPES_ONLY.get(func, func) if operands.on_meta else func
    kernel = LACKING.get(func.name(), kernel)
    result = kernel(*inner_args, **inner_kwargs)
    if func in WAITS:
        device.timeline.host_learns(lane.snapshot())
    if to_host:
        return device.pin(result) if pinned else result
    return operands.wrap(result)


# ------------------------------------------------------------------------------------------------ between memories


def copy(device: SimulatedDevice, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`target.copy_(source, non_blocking)`, where at least one of them is on the device."""
    if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor):
        return run(aten.copy_.default, device, target, source)
    lane, timeline, to_host = current_lane(), device.timeline, isinstance(source, DeviceTensor)
    mine, host = (source, target) if isinstance(source, DeviceTensor) else (target, source)
    assert isinstance(mine, DeviceTensor)
    device.check(mine)
    lane.number += 1
    device.use(mine, lane, not to_host, f"a copy to the {'host' if to_host else 'device'}")
    same = mine.dtype == host.dtype and mine.shape == host.shape and mine.is_contiguous() and host.is_contiguous()
    if non_blocking and same and mine.allocation is not None and device.is_pinned(host):
        issue = timeline.copy_to_host if to_host else timeline.copy_to_device
        issue(host, mine.plain, mine.allocation.history, lane)
        return target
    timeline.meet_on_host(host, lane, writes=to_host)
    if not mine.plain.is_meta and not host.is_meta:
        (host if to_host else mine.plain).copy_(mine.plain if to_host else host)
    elif to_host and keeps_values(host.untyped_storage().nbytes(), host.dtype):
        host.fill_(1)
    timeline.host_learns(lane.snapshot())
    return target


def _to_copy(device: SimulatedDevice, source: DeviceTensor, /, **options: Any) -> Tensor:
    """`source.to(...)`: a cast on the device, or a copy to the host (into pinned memory if it is non-blocking)."""
    where, non_blocking = options.pop("device", None), options.pop("non_blocking", False)
    kept = {name: value for name, value in options.items() if name in ("dtype", "memory_format") and value is not None}
    if where is None or torch.device(where).type == NAME:
        return run(aten._to_copy.default, device, source, **kept)
    made = torch.empty_like(source.plain, device=where, **kept)
    if made.is_meta:
        return made
    return copy(device, device.pin(made) if non_blocking else made, source, non_blocking)


def _record_stream(device: SimulatedDevice, tensor: DeviceTensor, stream: Any) -> None:
    if tensor.allocation is not None:
        tensor.allocation.history.recorded.add(stream.stream_id)


_OTHERWISE: dict[Any, Callable[..., Any]] = {
    aten.copy_.default: copy,
    aten._to_copy.default: _to_copy,
    aten.record_stream.default: _record_stream,
}
