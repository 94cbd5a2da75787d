"""The device: which one, what it can do, how full it is. The only module that knows what is CUDA's alone.

On a machine without an accelerator the host is the device: its bytes are the process' resident memory.
Imported by: training, generation, export, the commands.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from qlora_kit.errors import RecipeError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h
NEVER, LARGEST_MMAP_THRESHOLD = -1, 32 << 20  # what glibc accepts
STATUS = Path("/proc/self/status")
_frugal = False  # glibc's heap is the process' own, so what it was told is too


def pick_device(name: str = "auto") -> torch.device:
    """The device of `train.device`; auto: the accelerator if there is one, else the CPU.

    Raises: RecipeError: it is asked for by name and not there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    if name != "cpu" and (accelerator is None or accelerator.type != name):
        found = accelerator.type if accelerator else "none"
        raise RecipeError(f"train.device: {name} is not available, accelerator found: {found}; use auto or cpu")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What plans call it: a card as its driver does, other devices by their kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def has_unified_memory(device: torch.device) -> bool:
    """Whether bitsandbytes can page optimizer state between device and host (CUDA's managed memory)."""
    return device.type == "cuda"


def _tell_heap(settings: dict[int, int]) -> bool:
    """Set parameters of glibc's heap; whether it took them all. Elsewhere there is nothing to set."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        return all(libc.mallopt(name, value) for name, value in settings.items())
    return False


def return_freed_memory() -> None:
    """Ask glibc to map all but small tensors one by one, so that what is freed goes back to the system at once.

    By default its threshold grows with what was freed, and blocks of different sizes then fragment the heap: the
    quickstart's process held 100 MB more. It costs a tenth of a step in fresh pages. Gradients are above the threshold:
    in their places small tensors would keep pages in use between two steps.
    """
    global _frugal
    _frugal = _tell_heap({M_MMAP_THRESHOLD: 1 << 16})


def keep_freed_memory() -> None:
    """Ask glibc for the opposite: one heap for all threads, never given back, so that a step touches no fresh page.

    By default autograd's thread has a heap of its own, returned and taken again with every large tensor: a twentieth
    of a step of the 1B shape (`tools.bench_roofline`).
    """
    _tell_heap({M_ARENA_MAX: 1, M_TRIM_THRESHOLD: NEVER, M_MMAP_THRESHOLD: LARGEST_MMAP_THRESHOLD})


def trim_freed_memory() -> None:
    """Give back what smaller tensors have left free in the heap, if `return_freed_memory` was called before.

    Between backward and the optimizer's step: gradients stay and activations have gone, so half of the heap is holes.
    """
    if _frugal:
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _allocator() -> Any:
    """The allocator's figures: `torch.accelerator`'s, or CUDA's own where torch is older than 2.9."""
    return torch.accelerator if hasattr(torch.accelerator, "max_memory_allocated") else torch.cuda


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of `peak_bytes`. The host's peak cannot be reset without root; it stays."""
    if device.type != "cpu":
        _allocator().reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes in use on the device so far: the allocator's, or on the CPU the process' resident set."""
    if device.type != "cpu":
        return _allocator().max_memory_allocated(device)
    if STATUS.is_file():  # getrusage would count what the parent held when it started this process
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def runtime_bytes(device: torch.device) -> int:
    """Memory of the device beside `peak_bytes`: what the allocator had to reserve more, and on CUDA the context.

    On CUDA that is all that is in use on the card and not the allocator's, other processes' too. 0 on the CPU, where
    nobody can say.
    """
    if device.type == "cpu":
        return 0
    slack: int = _allocator().max_memory_reserved(device) - _allocator().max_memory_allocated(device)
    if device.type != "cuda":
        return slack
    free, total = torch.cuda.mem_get_info(device)
    return slack + total - free - torch.cuda.memory_reserved(device)


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return torch.accelerator.get_memory_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def attainable_bytes(device: torch.device) -> int:
    """Most that this process could hold on the device now: what it holds, and what nobody uses."""
    held = resident_bytes() if device.type == "cpu" else _allocator().memory_reserved(device)
    return held + free_bytes(device)


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an error says that there is no more memory: of torch's allocators, of CUDA's or Metal's own, or Python's.

    A CPU's is seen where the system refuses (`ulimit -v`, no overcommit); else the kernel ends the process.
    """
    if isinstance(problem, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(problem)
    return isinstance(problem, RuntimeError) and ("DefaultCPUAllocator" in said or "out of memory" in said)


def clear_freed_memory(device: torch.device) -> None:
    """After running out: free what only cycles of an error's frames hold, and what the allocator keeps for later."""
    gc.collect()
    if device.type != "cpu":
        _allocator().empty_cache()


def resident_bytes() -> int:
    """Host memory that this process holds now."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    import psutil

    return psutil.Process().memory_info().rss
