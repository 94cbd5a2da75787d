"""Steps of a real run at the worst shape that its data has: bytes by component beside the plan, and tokens per second.

Why: a plan is a promise; this is the check, on the user's own machine, model and data, before hours are spent. How: the
run is prepared as `train` prepares it and every step is given the longest rows. One step makes the optimizer's state
and warms up, `steps` are timed, and one more, not timed, is followed by `tracker`. Nothing of it is saved.
On an accelerator the total is the allocator's, and what the tracker cannot name is OTHER; on a CPU it is the growth of
the process, and what is no tensor's is `runtime`. Imported by: the commands `profile`, and `train` for its first step.
"""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass
from typing import Any

from qlora_kit.base.device import peak_bytes, pick_device, reset_peak, runtime_bytes
from qlora_kit.data.batches import Batches, MicroBatch
from qlora_kit.planning.comparison import OTHER, comparison
from qlora_kit.planning.components import COMPONENTS, Ledger
from qlora_kit.planning.planner import Plan
from qlora_kit.planning.report import MOMENTS
from qlora_kit.profiling.tracker import Series, Tracker
from qlora_kit.recipe import Recipe
from qlora_kit.training.calibrate import calibrate
from qlora_kit.training.loop import train_step
from qlora_kit.training.memory import explained, interpreter_bytes, static_tensors, with_unseen
from qlora_kit.training.run import Peak, Run, choose_heap, prepare
from qlora_kit.training.signals import StopRequest
from qlora_kit.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Profile:
    """What a step took.

    Attributes:
        device: its kind.
        planned: the plan's ledger at the peak of a training step.
        planned_moment: when that is, in words.
        measured: bytes by the tracker's NAMES at the measured peak.
        measured_place: the part of the step in which that was.
        process_bytes: on the CPU, growth of the process' resident memory from before the base was loaded to its peak.
        shape: rows and tokens of the longest micro-batch, padding included.
        micro_batches, tokens, learned_tokens: of a step; tokens without padding.
        steps, step_s: how many were timed, and their median.
        series: the memory of one step over time.
    """

    device: str
    planned: Ledger
    planned_moment: str
    measured: dict[str, int]
    measured_place: str
    process_bytes: int | None
    shape: tuple[int, int]
    micro_batches: int
    tokens: int
    learned_tokens: int
    steps: int
    step_s: float
    series: Series

    @property
    def tokens_per_s(self) -> float:
        """Real tokens, padding not counted."""
        return self.tokens / self.step_s

    @property
    def measured_bytes(self) -> int:
        """The measured peak."""
        return sum(self.measured.values())

    def to_json(self) -> dict[str, Any]:
        """What `profile --json` prints."""
        measured: dict[str, Any] = {
            "components": {name: self.measured[name] for name in COMPONENTS},
            "other_bytes": self.measured[OTHER],
            "peak_bytes": self.measured_bytes,
            "peak_at": self.measured_place,
        }
        if self.process_bytes is not None:
            measured["process_bytes"] = self.process_bytes
        return {
            "schema": 1,
            "device": self.device,
            "planned": {"components": dict(self.planned), "peak_bytes": sum(self.planned.values())},
            "measured": measured,
            "tokens_per_s": self.tokens_per_s,
            "step_s": self.step_s,
            "steps": self.steps,
            "tokens": self.tokens,
            "learned_tokens": self.learned_tokens,
            "micro_batches": self.micro_batches,
            "longest_micro_batch": list(self.shape),
        }

    def facts(self) -> list[str]:
        """What was run and found, for people; without the table of components."""
        rows, width = self.shape
        shape = f"{self.micro_batches} micro-batch(es) of {rows} x {width} tokens, the longest there are"
        other = 100 * self.measured[OTHER] / self.measured_bytes
        found = [
            f"{shape}: {format_seconds(self.step_s)} a step, {self.tokens_per_s:,.0f} tokens/s on {self.device}",
            f"{self.learned_tokens:,} of {self.tokens:,} tokens are learned; a plan counts logits as if all were",
            f"peak planned at {self.planned_moment}, measured in: {self.measured_place}; {other:.1f} % is nobody's",
        ]
        if self.process_bytes is not None:
            process = format_bytes(self.process_bytes)
            found.append(f"the process grew by {process} at most, with what libraries take and the heap leaves free")
        return found

    def lines(self) -> list[str]:
        """The same with the table."""
        return [*self.facts(), *comparison(self.planned, self.measured)]


class _WorstSteps(Batches):
    """Every step is the one with the longest rows."""

    def __init__(self, batches: Batches) -> None:
        self.micro_batches = batches.worst()
        rows, width = self.micro_batches[0].input_ids.shape
        self.shape = (rows, width)

    def step(self, step: int) -> list[MicroBatch]:
        return self.micro_batches


def profile(recipe: Recipe, plan: Plan, steps: int) -> Profile:
    """Run `steps` + 2 optimizer steps of a recipe as planned, and measure.

    Raises: every error that `train` raises before its first step; BudgetError: memory ran out.
    """
    device, before_bytes = pick_device(recipe.train.device), interpreter_bytes(recipe)
    choose_heap(device, plan.roomy)
    run = prepare(recipe, StopRequest())
    with contextlib.suppress(OSError):
        run.output.rmdir()  # if it is empty: no run was here
    worst = _WorstSteps(run.batches)
    run.batches, run.total_steps = worst, max(run.total_steps, steps + 2)
    with explained(run):
        train_step(run)
        lines = [train_step(run) for _ in range(steps)]
        process_bytes = peak_bytes(device) - before_bytes if device.type == "cpu" else None
        tracker = follow_step(run)
    total_bytes = peak_bytes(device) if process_bytes is None else max(process_bytes, tracker.peak_bytes)
    beside_bytes = runtime_bytes(device) if process_bytes is None else process_bytes - tracker.peak_bytes
    calibrate(run, plan.components, beside_bytes, lines)
    return Profile(
        device=device.type,
        planned=plan.components,
        planned_moment=MOMENTS[plan.peak_moment],
        measured=with_unseen(tracker.peak, device, total_bytes),
        measured_place=str(tracker.peak_place),
        process_bytes=process_bytes,
        shape=worst.shape,
        micro_batches=len(worst.micro_batches),
        tokens=sum(batch.tokens for batch in worst.micro_batches),
        learned_tokens=sum(batch.learned_tokens for batch in worst.micro_batches),
        steps=steps,
        step_s=statistics.median(line["step_s"] for line in lines),
        series=tracker.series,
    )


def follow_step(run: Run) -> Tracker:
    """One optimizer step under a tracker; the device's peak is that of this step."""
    reset_peak(run.base.device)
    with Tracker(run.base.device, static_tensors(run)) as tracker:
        train_step(run)
    return tracker


def followed_step(run: Run) -> dict[str, Any]:
    """`train_step` under a tracker, which leaves in `run.peak` what it saw; no bit of the step is another."""
    with Tracker(run.base.device, static_tensors(run)) as tracker:
        line = train_step(run)
    run.peak = Peak(line["step"], str(tracker.peak_place), tracker.peak)
    return line
