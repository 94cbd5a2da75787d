"""What was measured on this machine, kept for the next plan: bytes of the run-time system, and how fast a step was.

Why: what a driver or a kernel library takes before any tensor differs from machine to machine, and no config tells.
How: `train` and `profile` leave a few figures for each device in one small JSON file in the user's cache; a plan for
the same device reads them. With QLORA_KIT_NO_CALIBRATION set nothing is read or written.
Imports no torch. Imported by: planning.hardware, planning.timing; training.calibrate writes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qlora_kit import files
from qlora_kit.errors import DiskError

OFF = "QLORA_KIT_NO_CALIBRATION"  # environment: any value but an empty one


def calibration_file() -> Path:
    """Where it is kept: {device name: {figure: number}}."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "qlora_kit" / "calibration.json"


def calibrated(name: str) -> dict[str, float]:
    """Figures of a device, all finite and positive; empty: none, or the file is not what it should be."""
    found = _read().get(name)
    if not isinstance(found, dict) or os.environ.get(OFF):
        return {}
    return {key: float(value) for key, value in found.items() if _is_figure(value)}


def remember(name: str, **figures: float) -> None:
    """Keep figures of a device beside those that are there; a cache that cannot be written is no error."""
    if os.environ.get(OFF) or not figures:
        return
    content = _read()
    kept = content.get(name)
    content[name] = (kept if isinstance(kept, dict) else {}) | figures
    try:
        files.write_json(calibration_file(), content)
    except DiskError as problem:
        from qlora_kit.console import note  # rich: not for every plan

        note(f"what was measured is not kept for later plans: {problem}")


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")


def _read() -> dict[str, Any]:
    try:
        content = json.loads(calibration_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
