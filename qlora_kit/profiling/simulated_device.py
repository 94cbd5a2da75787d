"""A simulated accelerator for tests and proofs: torch device `simgpu`, living in host memory.

    with simulated_device(limit_bytes=24 << 30, shapes_only=True) as device:
        model.to("simgpu")
        step()
        print(device.peak_bytes)

Why: what a GPU would run (two memories, a hard limit, copies that are late) must be exercised on machines without one,
by the code that a GPU would run.
How: torch's PrivateUse1 slot with its Python back end (torch >= 2.9, experimental). Values live in CPU tensors, so that
a run can be compared bit by bit with one on the CPU; or with `shapes_only` nowhere: a 70B step takes seconds.
What that back end lacks is put in place while a device is active: torch.Stream, Event and Generator, pinned memory,
torch.accelerator's streams and figures, errors from within backward.
Otherwise than on CUDA: backward runs in the thread of its caller, numbers drawn are the CPU's, kernels need no
workspace, the allocator keeps no slack, asking a stream or event whether it is done waits for it.
Not for a process that uses a real accelerator: once registered, torch takes this one for the only one.
Imported by: tests, tools.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types
from torch.utils._device import _device_constructors
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from qlora_kit.profiling.simulated_kernels import FUSED, attention, keeps_values
from qlora_kit.profiling.simulated_streams import (
    NAME,
    Event,
    Generator,
    Stream,
    current_lane,
    current_stream,
    set_stream,
)
from qlora_kit.profiling.simulated_tensor import (
    DeviceTensor,
    SimulatedDevice,
    copy,
    on_active_device,
    run,
)
from qlora_kit.profiling.simulated_timeline import DeviceRaceError

__all__ = ["DeviceRaceError", "SimulatedDevice", "simulated_device"]

_UNLIMITED_BYTES = 1 << 50  # what is said to be the total where there is no limit
_run_backward = torch.autograd._engine_run_backward
_raise_pending_error = ctypes.pythonapi.Py_IsInitialized  # ctypes does so after every call of this kind


@contextlib.contextmanager
def simulated_device(
    limit_bytes: int | None = None, *, shapes_only: bool = False, on_race: str = "raise"
) -> Iterator[SimulatedDevice]:
    """The device `simgpu`, for as long as the block runs; afterwards torch is as it was.

    Args:
        limit_bytes: of the device's memory; None: no limit.
        shapes_only: compute shapes and bytes, and of values only those of ids, positions and masks.
        on_race: "raise" DeviceRaceError, or "poison": compute with what was not waited for.
    Raises: RuntimeError: one is active already, or the block ends on another stream than it began on.
    """
    if SimulatedDevice.active is not None:
        raise RuntimeError("a simulated device is active already")
    _register()
    device = SimulatedDevice(limit_bytes, shapes_only, on_race)
    with contextlib.ExitStack() as at_exit:
        for where, name, stand_in in _stand_ins(device):
            at_exit.callback(_restore, where, name, vars(where).get(name, at_exit), at_exit)
            setattr(where, name, stand_in)
        _foreach_supported_types.append(DeviceTensor)  # so that torch's optimizers take the path of a GPU
        at_exit.callback(_foreach_supported_types.remove, DeviceTensor)
        at_exit.callback(_activate, None)
        _activate(device)
        yield device
        device.timeline.synchronize()
        if current_lane() is not device.timeline.default:
            raise RuntimeError(f"{NAME}: the block ends on another stream than the default one")


def _activate(device: SimulatedDevice | None) -> None:
    SimulatedDevice.active, Stream.active = device, None if device is None else device.timeline
    set_stream(None)


def _restore(where: Any, name: str, before: Any, absent: Any) -> None:
    if before is absent:
        delattr(where, name)
    else:
        setattr(where, name, before)


def _stand_ins(device: SimulatedDevice) -> list[tuple[Any, str, Any]]:
    """(where, name, what takes its place) for what torch's Python back end lacks."""
    accelerator: dict[str, Callable[..., Any]] = {
        "current_stream": current_stream,
        "set_stream": set_stream,
        "synchronize": lambda where=None: device.timeline.synchronize(),
        "memory_allocated": lambda where=None: device.live_bytes,
        "memory_reserved": lambda where=None: device.live_bytes,
        "max_memory_allocated": lambda where=None: device.peak_bytes,
        "max_memory_reserved": lambda where=None: device.peak_bytes,
        "reset_peak_memory_stats": lambda where=None: device.reset_peak(),
        "get_memory_info": lambda where=None: _free_and_total(device),
        "empty_cache": lambda: None,
    }
    return [
        (torch, "Stream", Stream),
        (torch, "Event", Event),
        (torch, "Generator", Generator),
        (torch.autograd, "_engine_run_backward", functools.partial(_backward, device)),
        (Tensor, "pin_memory", lambda tensor, where=None: _pin_memory(device, tensor)),
        (Tensor, "is_pinned", lambda tensor, where=None: tensor.device.type != NAME and device.is_pinned(tensor)),
        *[(torch, name, _pinning(device, name)) for name in ("empty", "zeros", "empty_like", "empty_strided")],
        *[(torch.accelerator, name, function) for name, function in accelerator.items()],
    ]


def _free_and_total(device: SimulatedDevice) -> tuple[int, int]:
    total = _UNLIMITED_BYTES if device.limit_bytes is None else device.limit_bytes
    return total - device.live_bytes, total


def _backward(device: SimulatedDevice, *args: Any, **kwargs: Any) -> Any:
    """torch's backward, in this thread: it has no thread for a device that came after its first backward."""
    try:
        with torch.autograd.set_multithreading_enabled(False):
            return _run_backward(*args, **kwargs)
    except SystemError as problem:  # what becomes of an error that `_Guard` dropped
        raise (device.take_error() or problem) from None


def _pin_memory(device: SimulatedDevice, tensor: Tensor) -> Tensor:
    if tensor.device.type == NAME:
        raise RuntimeError(f"cannot pin a tensor on {NAME}: only dense CPU tensors can be pinned")
    if device.is_pinned(tensor):
        return tensor
    pinned = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    if not device.shapes_only or keeps_values(pinned.untyped_storage().nbytes(), pinned.dtype):
        pinned.copy_(tensor.detach())  # else its memory is never touched
    return device.pin(pinned)


def _pinning(device: SimulatedDevice, name: str) -> Callable[..., Tensor]:
    """The function `name` of torch, with `pin_memory`."""
    make = getattr(torch, name)

    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        return device.pin(tensor) if pin_memory else tensor

    return made


# --------------------------------------------------------------------------------- once for the process


class _Guard(torch._C._acc.DeviceGuard):
    """torch asks it for the device's type also while it unwinds from a kernel's error in backward, and dies if Python
    still has that error set. So it is dropped here; torch then complains that none is set, and `_backward` raises
    the copy that the device kept."""

    def type_(self) -> Any:
        try:  # noqa: SIM105 - with an error set, no other call may come first
            _raise_pending_error()
        except BaseException:
            pass
        return torch._C._autograd.DeviceType.PrivateUse1


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return SimulatedDevice.active is not None

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, index: int) -> bool:
        return SimulatedDevice.active is not None


def _empty(device: SimulatedDevice, size: Any, /, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    """Kernel of aten::empty."""
    layout = memory_format or torch.contiguous_format
    return device.make(lambda where: torch.empty(size, dtype=dtype, memory_format=layout, device=where))


def _empty_strided(device: SimulatedDevice, size: Any, stride: Any, /, *, dtype: Any = None, **_: Any) -> Tensor:
    """Kernel of aten::empty_strided."""
    return device.make(lambda where: torch.empty_strided(size, stride, dtype=dtype, device=where))


@functools.cache
def _register() -> torch.library.Library:
    """Give torch the name, the kernels that make tensors, and those that no CPU tensor takes part in."""

    def is_active() -> bool:
        return SimulatedDevice.active is not None

    module = SimpleNamespace(
        is_available=is_active,
        is_initialized=is_active,
        device_count=lambda: int(is_active()),
        current_device=lambda: 0,
        manual_seed_all=lambda seed: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        _is_in_bad_fork=lambda: False,
    )
    _device_constructors()  # caches torch's functions: to be called before `_stand_ins` exchanges some of them
    _setup_privateuseone_for_python_backend(NAME, backend_module=module, hook=_Hooks(), device_guard=_Guard())
    kernels: dict[str, Callable[..., Any]] = {
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "_copy_from": lambda device, source, target, late=False: copy(device, target, source, late),
        **{name: functools.partial(run, getattr(torch.ops.aten, name).default) for name in FUSED},
    }
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in kernels.items():
        library.impl(name, functools.partial(on_active_device, kernel), "PrivateUse1")
    library.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
    return library
