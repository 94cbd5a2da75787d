"""`qlora-kit doctor`: what this machine has for training, and what is missing. Imported by: the command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from qlora_kit import __version__
from qlora_kit.units import format_bytes

PACKAGES = ("torch", "transformers", "bitsandbytes", "safetensors", "accelerate", "tokenizers")
MINIMUM_HOST_BYTES = 4 << 30


def examine() -> dict[str, Any]:
    """Versions, processor, memory, disk, accelerator, whether the NF4 kernels work, and a list of problems."""
    import psutil

    memory = psutil.virtual_memory()
    report: dict[str, Any] = {
        "qlora_kit": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "host_bytes": memory.total,
        "host_available_bytes": memory.available,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
    }
    report["accelerator"] = _accelerator()
    report["nf4"] = _nf4_works()
    report["problems"] = _problems(report)
    return report


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _accelerator() -> dict[str, Any] | None:
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    found: dict[str, Any] = {"type": device.type, "count": torch.accelerator.device_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "bytes": properties.total_memory}
        # `is_bf16_supported` alone says yes to a T4, by emulation: tensor cores for bf16 begin at capability 8.
        found["native_bf16"] = properties.major >= 8
    return found


def _nf4_works() -> bool:
    """Quantize and dequantize a small weight on the device that training would use."""
    import torch

    from qlora_kit.base import nf4
    from qlora_kit.base.device import pick_device

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16().to(pick_device())
    back = nf4.dequantize(nf4.quantize(weight, "nf4", True), (64, 128), "nf4", torch.bfloat16)
    return bool((back.float() - weight.float()).norm() < 0.15 * weight.float().norm())


def _problems(report: dict[str, Any]) -> list[str]:
    problems = [f"package {name} is not installed" for name, version in report["packages"].items() if version is None]
    if not report["nf4"]:
        problems.append("4-bit quantization does not work here; look at `python -m bitsandbytes`")
    if report["host_available_bytes"] < MINIMUM_HOST_BYTES:
        problems.append(f"only {format_bytes(report['host_available_bytes'])} of host memory is free")
    accelerator = report["accelerator"]
    if accelerator and accelerator.get("native_bf16") is False:
        problems.append(f"{accelerator['name']} has no native bf16: set model.dtype and adapter.dtype to float16")
    return problems


def print_report(report: dict[str, Any]) -> None:
    """The same for people."""
    accelerator = report["accelerator"]
    name = "none; training runs on the CPU"
    if accelerator is not None:
        name = f"{accelerator.get('name', accelerator['type'])} x {accelerator['count']}"
        name += f", {format_bytes(accelerator['bytes'])}" if "bytes" in accelerator else ""
    versions = "  ".join(f"{package} {version or 'missing'}" for package, version in report["packages"].items())
    print(f"qlora_kit    {report['qlora_kit']} on Python {report['python']}")
    print(f"packages     {versions}")
    print(f"accelerator  {name}")
    host = f"{format_bytes(report['host_available_bytes'])} free of {format_bytes(report['host_bytes'])}"
    print(f"host memory  {host}, {report['cpu_cores']} cores")
    print(f"disk here    {format_bytes(report['disk_free_bytes'])} free")
    print(f"NF4 kernels  {'work' if report['nf4'] else 'DO NOT WORK'}")
    for problem in report["problems"]:
        print(f"problem      {problem}")
    print("ready" if not report["problems"] else f"{len(report['problems'])} problem(s)")
