"""What a run tells: one JSON line a step in `metrics.jsonl`, the progress bar, and optional trackers.

Imported by: training.loop.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_kit.console import progress
from qlora_kit.errors import RecipeError
from qlora_kit.files import append_line, write_bytes
from qlora_kit.units import format_bytes


class Metrics:
    """Writes one line per event to every place that was asked for."""

    def __init__(self, log: Callable[[dict[str, Any]], None], advance: Callable[[float, str], None], trackers: Any):
        self._log, self._advance, self._trackers = log, advance, trackers

    def step(self, line: dict[str, Any]) -> None:
        """One optimizer step."""
        self._log(line)
        loss = "skipped" if line["loss"] is None else f"loss {line['loss']:.3f}"
        memory = format_bytes(line["device_peak_bytes"])
        self._advance(1, f"{loss}  {line['tokens_per_s']:.0f} tokens/s  peak {memory}")
        self._track({key: value for key, value in line.items() if key != "step" and value is not None}, line["step"])

    def evaluation(self, line: dict[str, Any]) -> None:
        """One evaluation."""
        self._log(line)
        self._track({"eval_loss": line["eval_loss"]}, line["step"])

    def _track(self, values: dict[str, Any], step: int) -> None:
        if self._trackers is not None:
            self._trackers.log(values, step=step)


@contextlib.contextmanager
def open_metrics(
    path: Path, *, done: int, total: int, trackers: list[str], settings: dict[str, Any]
) -> Iterator[Metrics]:
    """Metrics of a run that has done `done` of `total` steps; lines of later steps (of a killed run) are dropped."""
    if path.is_file():
        keep = [line for line in path.read_bytes().splitlines(keepends=True) if _step(line) <= done]
        write_bytes(path, b"".join(keep) if done else b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    accelerator = _start_trackers(trackers, path.parent, settings)
    with open(path, "a", encoding="utf-8") as file, progress("training", total) as advance:
        advance(done, "")
        yield Metrics(lambda line: append_line(file, line), advance, accelerator)
    if accelerator is not None:
        accelerator.end_training()


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """All lines that a run has left in its folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _step(line: bytes) -> float:
    """The step of a line; infinity for one that a kill tore."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _start_trackers(names: list[str], folder: Path, settings: dict[str, Any]) -> Any:
    """accelerate's trackers, or None. Raises: RecipeError: a tracker's package is not installed."""
    if not names:
        return None
    from accelerate import Accelerator

    flat = {
        f"{section}.{key}": str(value)
        for section, part in settings.items()
        if isinstance(part, dict)
        for key, value in part.items()
    }
    try:
        accelerator = Accelerator(log_with=names, project_dir=str(folder))
        accelerator.init_trackers("qlora_kit", config=flat)
    except (ImportError, ValueError) as problem:
        raise RecipeError(f"train.trackers: {names}: {problem}; install the tracker's package") from problem
    return accelerator
