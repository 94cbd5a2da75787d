"""Predicted against measured, at the end of a run and in its `memory.json`.

Measured so far is the peak as a whole: the allocator's on CUDA; on the CPU the process' peak resident memory less what
the interpreter and its libraries held before the base was loaded. Imported by: training.loop, the `train` command.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qlora_kit import files
from qlora_kit.base.device import peak_bytes
from qlora_kit.units import format_bytes


def write_memory(path: Path, plan: dict[str, Any] | None, device: torch.device, before_bytes: int) -> None:
    """Write `{"planned": {...}, "measured": {...}}`; bytes throughout."""
    peak = peak_bytes(device)
    measured = {"peak_bytes": peak, "device": device.type}
    if device.type == "cpu":
        measured |= {"interpreter_bytes": before_bytes, "peak_bytes": peak - before_bytes}
    planned = {key: plan[key] for key in ("components", "peak_bytes")} if plan else None
    files.write_json(path, {"planned": planned, "measured": measured})


def memory_line(path: Path) -> str:
    """One line of a run's `memory.json`."""
    memory = json.loads(path.read_text())
    measured = memory["measured"]["peak_bytes"]
    if memory["planned"] is None:
        return f"peak memory {format_bytes(measured)}"
    planned = memory["planned"]["peak_bytes"]
    return f"peak memory {format_bytes(measured)} measured, {format_bytes(planned)} planned"
