"""How much memory a device has: a card of the catalogue, the card in this machine, or the host's RAM.

Why: a plan is made before torch is imported, often for a card that is not here. Imports no torch, and psutil only when
the host's memory is asked for. Imported by planning/planner.py and the command line.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_kit.errors import RecipeError, nearest
from qlora_kit.planning.calibration import calibrated
from qlora_kit.planning.gpus import CARDS

GIB = 2**30
# CUDA context, cuBLAS workspace and the allocator's rounding: an estimate for one process, 64-bit Linux. The context
# alone is 250 to 500 MiB, by card and driver; what `nvidia-smi` shows above torch's own figure before any model.
CUDA_RUNTIME_BYTES = 512 * 2**20
# Pages of the kernels' code and what oneDNN compiles, above libraries that were only imported: 43 to 50 MiB in
# `tools.prove_rss` where the heap has no holes.
CPU_RUNTIME_BYTES = 45 * 2**20
RUNTIME_BYTES = {"cuda": CUDA_RUNTIME_BYTES, "xpu": CUDA_RUNTIME_BYTES, "cpu": CPU_RUNTIME_BYTES}
UNIFIED_MEMORY_SHARE = 0.75  # of the RAM of an Apple machine, what Metal lets the GPU take


@dataclass(frozen=True)
class Device:
    """Where the model lives.

    Attributes:
        kind: "cuda", "cpu", "mps", "xpu".
        name: what to call it.
        memory_bytes: what a run may take of it.
        beyond_bytes: what it has besides, where a budget leaves some of an accelerator.
        measured_bytes: what its run-time system took in an earlier run here (`planning.calibration`).
    """

    kind: str
    name: str
    memory_bytes: int
    beyond_bytes: int = 0
    measured_bytes: int | None = None

    @property
    def installed_bytes(self) -> int:
        """All of its memory, as far as it is known."""
        return self.memory_bytes + self.beyond_bytes

    @property
    def runtime_bytes(self) -> int:
        """What the run-time system takes beside any tensor: as measured here, else a constant of the kind of device."""
        return RUNTIME_BYTES.get(self.kind, 0) if self.measured_bytes is None else self.measured_bytes


def fixed_runtime_bytes(kind: str, name: str) -> int:
    """`Device.runtime_bytes` of a device of this machine."""
    return _with_measured(Device(kind, name, 0)).runtime_bytes


def _with_measured(device: Device) -> Device:
    """The device with what an earlier run found."""
    found = calibrated(device.name).get("runtime_bytes")
    return device if found is None else replace(device, measured_bytes=int(found))


def find_gpu(name: str) -> Device:
    """A card of the catalogue; case, blanks and the maker's words do not matter: "NVIDIA GeForce RTX 4090".

    Raises: RecipeError: not in the catalogue; names the nearest.
    """
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    key = re.sub(r"^(nvidia-)?((geforce|tesla)-)?", "", key)
    key = f"rtx-{key}" if key[:1].isdigit() else key
    if key not in CARDS:
        same_card = [known for known in CARDS if known.startswith(f"{key}-") and known.removeprefix(key)[1].isdigit()]
        hint = f"; which one, {' or '.join(same_card)}?" if same_card else nearest(key, list(CARDS))
        raise RecipeError(f"--gpu {name!r:.80}: unknown card{hint}; known: {', '.join(CARDS)}; or give --budget")
    return Device("cuda", key, CARDS[key].memory_bytes)


def detect_gpu() -> Device | None:
    """The first NVIDIA card of this machine, asked of its driver's own tool; None: there is none, or no answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=memory.total,name", "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        mebibytes, _, name = answer.strip().partition(",")
        return Device("cuda", name.strip(), int(mebibytes) * 2**20)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _cgroup_free_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """What this process' control group may still take (version 2 seen from inside, or version 1); None: no limit."""
    try:
        if (root / "memory.max").exists():
            folder, names, cache = root, ("memory.max", "memory.current"), "inactive_file"
        else:
            path = next(line.split(":", 2)[2] for line in own.read_text().splitlines() if ":memory:" in line)
            folder, cache = root / "memory" / path.lstrip("/"), "total_inactive_file"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (int((folder / name).read_text()) for name in names)
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(limit - used + int(statistics.get(cache, 0)), 0)
    except (OSError, ValueError, StopIteration):  # no such file, or "max"
        return None


def host_memory_bytes() -> int:
    """RAM that is free for this process now: what the system has available, or less in a limited container."""
    import psutil

    available: int = psutil.virtual_memory().available
    limited = _cgroup_free_bytes()
    return available if limited is None else min(available, limited)


def device_for(wanted: str, gpu: str | None = None, budget_bytes: int | None = None) -> Device:
    """The device to plan for, its memory cut to `budget_bytes` when that is less.

    Args:
        wanted: `train.device`; auto: `gpu` if given, else the card that is here, else the CPU.
        gpu: a name of the catalogue; need not be here.
        budget_bytes: the user's limit; also stands in where the memory of a named kind of device is not known.
    Raises: RecipeError: unknown card, a card for a run on the CPU, or a device whose memory nobody knows.
    """
    if gpu is not None and wanted not in ("auto", "cuda"):
        raise RecipeError(f"--gpu {gpu}: the recipe runs on train.device={wanted}; add --set train.device=cuda")
    device = find_gpu(gpu) if gpu is not None else _with_measured(_present_device(wanted, budget_bytes))
    if budget_bytes is None:
        return device
    allowed = min(device.memory_bytes, budget_bytes)
    beyond = 0 if device.kind == "cpu" else device.memory_bytes - allowed
    return replace(device, memory_bytes=allowed, beyond_bytes=beyond)


def _present_device(wanted: str, budget_bytes: int | None) -> Device:
    found = detect_gpu() if wanted in ("auto", "cuda") else None
    if found is not None:
        return found
    if wanted in ("cuda", "xpu"):
        if budget_bytes is None:
            raise RecipeError(f"train.device={wanted}: no such device is seen here; name one with --gpu, or --budget")
        return Device(wanted, wanted, budget_bytes)
    if budget_bytes is not None:
        kind = "cpu" if wanted == "auto" else wanted
        return Device(kind, kind, budget_bytes)
    if wanted == "mps":
        return Device("mps", "mps", int(host_memory_bytes() * UNIFIED_MEMORY_SHARE))
    return Device("cpu", "cpu", host_memory_bytes())
