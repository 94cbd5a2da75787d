"""The real training code on a simulated accelerator, shapes only: an exact second opinion on a plan, for any size.

Why: a plan is formulas; this runs what they describe, on any machine, and says what took the memory when it runs out.
How: a base without weights (`unfilled`), rows as long as they may be, every token learned; transformers' model, the
streamer, the loop and the optimizer run a step on a device that has what was allowed and no more. Tensors have shapes
and bytes but no values, and `simulate` runs blocks that are alike once (`simulated_blocks`), so a step of a 70B takes
seconds. What an allocator loses to fragmentation, and what kernels take inside, is not simulated.
Imported by: `plan --simulate`, tools, tests.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from qlora_kit.data.tokenize import Example
from qlora_kit.optimizers import OPTIMIZERS
from qlora_kit.planning.comparison import OTHER, comparison
from qlora_kit.planning.components import COMPONENTS, Ledger
from qlora_kit.planning.planner import Plan
from qlora_kit.profiling.simulated_blocks import pass_alike_blocks
from qlora_kit.profiling.simulated_device import SimulatedDevice, simulated_device
from qlora_kit.profiling.tracker import Series, Tracker
from qlora_kit.profiling.unfilled import unfilled_base
from qlora_kit.recipe import Recipe
from qlora_kit.training.evaluate import evaluate
from qlora_kit.training.loop import train_step
from qlora_kit.training.memory import static_tensors
from qlora_kit.training.run import Run, assemble, make_gradients, placement_of
from qlora_kit.training.signals import StopRequest
from qlora_kit.units import format_bytes

DEVICE = "simgpu"
DOCUMENTS = 2  # that share a packed row, so that attention needs its mask


@dataclass(frozen=True)
class Measured:
    """Bytes at the peak of a step: on the device, and pinned on the host."""

    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class Simulated:
    """How a step and an evaluation went.

    Attributes:
        limit_bytes: what the device had; None: no limit.
        components: bytes by the tracker's NAMES at the peak of the step, or when memory ran out.
        place: the part of the step in which that was.
        phases: peak bytes on the device of `train` and `eval`, as far as it came.
        host_bytes: most that was pinned on the host.
        refused: the device's words when memory ran out, or None.
        series: the memory of the step over time.
    """

    limit_bytes: int | None
    components: dict[str, int]
    place: str
    phases: dict[str, int]
    host_bytes: int
    refused: str | None
    series: Series

    def to_json(self) -> dict[str, Any]:
        """What `plan --simulate --json` adds under "simulated"; `runtime` is the allocator's rounding alone."""
        return {
            "fits": self.refused is None,
            "limit_bytes": self.limit_bytes,
            "components": {name: self.components[name] for name in COMPONENTS},
            "other_bytes": self.components[OTHER],
            "at": self.place,
            "phases": dict(self.phases),
            "host_bytes": self.host_bytes,
        }

    def lines(self, planned: Ledger) -> list[str]:
        """The same for people, beside the plan; the device's runtime, which is not simulated, is left out."""
        limit = "no limit" if self.limit_bytes is None else f"{format_bytes(self.limit_bytes)} for tensors"
        table = comparison(planned | {"runtime": 0}, self.components, "simulated")
        if self.refused is not None:
            return [f"simulated, {limit}: OUT OF MEMORY in: {self.place}", *table, f"  {self.refused}"]
        peaks = ", ".join(f"{name} {format_bytes(count)}" for name, count in self.phases.items())
        return [f"simulated, {limit}: it runs; the peak of a step is in: {self.place}; {peaks}", *table]


def examples(recipe: Recipe) -> list[Example]:
    """As many as a step takes, as long as they may be, every token learned."""
    documents = DOCUMENTS if recipe.data.packing else 1
    tokens = [1] * (recipe.data.seq_len // documents)
    rows = recipe.train.micro_batch * recipe.train.grad_accumulation
    return [Example(tokens, tokens, f"row {number}") for number in range(rows * documents)]


def measure(recipe: Recipe, limit_bytes: int | None = None) -> Measured:
    """One optimizer step of a recipe without `auto`, after the optimizer has its state.

    Raises: torch.OutOfMemoryError: it takes more than `limit_bytes`.
    """
    with simulated_device(limit_bytes, shapes_only=True) as device:
        run = unfilled_run(recipe)
        device.reset_peak()
        train_step(run)
        return Measured(device.peak_bytes, device.peak_pinned_bytes)


def unfilled_run(recipe: Recipe, held_out: bool = False) -> Run:
    """The recipe's run on the simulated device that is active, its optimizer's state made.

    Args:
        held_out: with as many rows to evaluate as a step has.
    """
    base, rows = unfilled_base(recipe.model, DEVICE, placement_of(recipe)), examples(recipe)
    fresh = recipe.adapter.model_copy(update={"start_from": None})  # of the same shapes; the device holds no values
    recipe = recipe.model_copy(update={"adapter": fresh})
    run = assemble(recipe, base, rows, rows if held_out else [], StopRequest())
    make_optimizer_state(run)
    return run


def make_optimizer_state(run: Run) -> None:
    """torch's own optimizers make it in their first step: here one with gradients of zero, which needs no forward."""
    if run.optimizer.state:  # bitsandbytes': `training.optim` has made it
        return
    make_gradients(run)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def simulate(plan: Plan, recipe: Recipe) -> Simulated:
    """Run what was planned for a recipe on a device that has the plan's budget, less the runtime, and no more."""
    limit = plan.budget_bytes - plan.components["runtime"]
    with tempfile.TemporaryDirectory() as folder, simulated_device(limit, shapes_only=True) as device:
        placed = plan.placed(recipe)
        shortened = _shortened(placed, folder)
        return _simulate(shortened, device, shortened.train.grad_accumulation < placed.train.grad_accumulation)


def _shortened(recipe: Recipe, folder: str) -> Recipe:
    """The recipe with its output in `folder`, an optimizer that needs no unified memory, and of its micro-batches only
    one group that passes together."""
    train, together = recipe.train, recipe.memory.micro_batches_together
    changes = {
        "optimizer": OPTIMIZERS[train.optimizer].unpaged or train.optimizer,
        "grad_accumulation": min(train.grad_accumulation, together if isinstance(together, int) else 1),
    }
    return recipe.model_copy(update={"train": train.model_copy(update=changes), "output": folder})


def _simulate(recipe: Recipe, device: SimulatedDevice, is_later_group: bool) -> Simulated:
    """A step and an evaluation; a later group of micro-batches meets the gradients of those before it."""
    phases: dict[str, int] = {}
    tracker, running, refused, host_bytes = Tracker(torch.device(DEVICE)), "loading", None, 0
    try:
        run = unfilled_run(recipe, held_out=recipe.data.eval is not None)
        pass_alike_blocks(run.base)
        tracker, running = Tracker(torch.device(DEVICE), static_tensors(run)), "training"
        device.reset_peak()
        with tracker:
            if is_later_group:
                make_gradients(run)
            train_step(run)
        phases["train"], running, host_bytes = device.peak_bytes, "evaluation", device.peak_pinned_bytes
        if run.held_out:
            device.reset_peak()
            evaluate(run.base, run.held_out, run.chunk_tokens, run.together)
            phases["eval"] = device.peak_bytes
    except torch.OutOfMemoryError as error:
        refused = str(error)
    place = tracker.peak_place if refused is None else tracker.place
    return Simulated(
        limit_bytes=device.limit_bytes,
        components=tracker.failed or tracker.peak,
        place=str(place) if refused is None or running == "training" else running,
        phases=phases,
        host_bytes=max(host_bytes, device.peak_pinned_bytes),
        refused=refused,
        series=tracker.series,
    )
