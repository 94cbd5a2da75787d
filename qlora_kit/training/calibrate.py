"""After a run or a profile: what was measured on this machine, for the plans to come (`planning.calibration`).

Bytes of the run-time system: on an accelerator the context and the allocator's slack; on a CPU what the process held
beside tensors, but only where its heap gave back what was freed: holes depend on the run, not on the machine. And one
rate, operations a second of a whole step: with all that is not a product in it, and with transfers, so it holds for
recipes like this one. Imported by: training.loop, profiling.profiler.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from qlora_kit.base.device import device_name
from qlora_kit.planning.calibration import remember
from qlora_kit.planning.components import Ledger
from qlora_kit.planning.planner import read_shapes
from qlora_kit.planning.quantities import tokens
from qlora_kit.planning.runtime import is_constant
from qlora_kit.planning.timing import step_operations
from qlora_kit.training.run import Run

FEWEST_STEPS = 3  # that a rate is taken from


def calibrate(run: Run, planned: Ledger, beside_bytes: int, steps: Sequence[dict[str, Any]]) -> None:
    """Keep what a run has shown of its device.

    Args:
        planned: bytes of the components at the planned peak.
        beside_bytes: what a CPU's process held beside tensors; of an accelerator `runtime_bytes`.
        steps: lines of metrics of steps at full speed, without the first.
    """
    device, figures = run.base.device, dict[str, float]()
    if beside_bytes > 0 and (device.type != "cpu" or is_constant(planned)):
        figures["runtime_bytes"] = beside_bytes
    if len(steps) >= FEWEST_STEPS:
        figures["operations_s"] = _operations_s(run, statistics.median(line["tokens_per_s"] for line in steps))
    remember(device_name(device), **figures)


def calibrate_by_run(run: Run, planned: Ledger, lines: Sequence[dict[str, Any]]) -> None:
    """The same from what a run has left, `lines` of metrics.jsonl, if its first step was followed."""
    if run.peak is None:
        return
    memory = json.loads((run.output / "memory.json").read_text())
    steps = [line for line in lines if "tokens_per_s" in line and line["step"] > run.peak.step]
    calibrate(run, planned, memory["measured"]["components"]["runtime"], steps)


def _operations_s(run: Run, tokens_per_s: float) -> float:
    """Operations a second, from tokens a second: as many to a token as in full rows."""
    of_a_step = tokens(run.recipe) * run.recipe.train.grad_accumulation
    return step_operations(read_shapes(run.recipe), run.recipe) / of_a_step * tokens_per_s
