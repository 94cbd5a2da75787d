"""What a run holds, by component, and predicted against measured: a run's `memory.json` and the end of `train`.

How: the static components are the tensors that the run holds between two steps, told apart here and nowhere else; what
moves within a step only a tracker can tell apart (`Run.peak`, of a step that was followed). The peak as a whole is the
allocator's, or on a CPU the process' peak resident memory less what the interpreter and its libraries held before the
base was loaded.
Imported by: training.loop, training.summary, profiling, tools.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit import files
from qlora_kit.base.device import attainable_bytes, is_out_of_memory, peak_bytes, resident_bytes, runtime_bytes
from qlora_kit.base.linear import FrozenLinear
from qlora_kit.base.loader import Base
from qlora_kit.base.source import libraries
from qlora_kit.errors import BudgetError
from qlora_kit.planning.comparison import OTHER, comparison
from qlora_kit.planning.planner import changes_that_fit, make_plan
from qlora_kit.planning.suggest import changed, in_rows
from qlora_kit.recipe import Recipe
from qlora_kit.training.optim import optimizer_state
from qlora_kit.training.run import Run
from qlora_kit.units import format_bytes

STATIC = ("base_nf4", "quant_constants", "base_unquantized", "adapter", "optimizer", "workspace")
SHORT_OF = 0.95  # of a planned peak that was too much


def interpreter_bytes(recipe: Recipe) -> int:
    """What the process holds with every library that the run will use, before it has read anything of its own."""
    for module in libraries(recipe.model.path, recipe.model.revision):
        importlib.import_module(module)
    return resident_bytes()


def static_tensors(run: Run) -> Iterator[tuple[str, Tensor]]:
    """(component, tensor) of all that the run holds on its device between two steps; what is away is not among them."""
    yield from _base_tensors(run.base, {id(parameter) for parameter in run.parameters.values()})
    yield from (("adapter", parameter) for parameter in run.parameters.values())
    state, _ = optimizer_state(run.optimizer, run.parameters)
    kind = run.base.device.type  # torch's own optimizers count their steps on the host
    yield from (("optimizer", tensor) for tensor in state.values() if tensor.device.type == kind)


def _base_tensors(base: Base, trained: set[int]) -> Iterator[tuple[str, Tensor]]:
    buffers = [] if base.streamer is None else list(base.streamer.buffers)
    workspaces = {linear.workspace for linear in base.linears().values() if linear.workspace is not None}
    buffers += [workspace.buffer for workspace in workspaces if workspace.buffer is not None]
    yield from (("workspace", buffer) for buffer in buffers)
    for linear in base.linears().values():
        yield from (entry for entry in _linear_tensors(linear) if not entry[1].is_meta)
    kept = [value for value in base.replaced.values() if isinstance(value, Tensor)]  # the base's own below an adapter's
    others = (value for value in (*base.model.parameters(), *kept) if id(value) not in trained)  # a tied one once
    yield from (("base_unquantized", value) for value in others if not value.is_meta)


def _linear_tensors(linear: FrozenLinear) -> Iterator[tuple[str, Tensor]]:
    for name in linear.stored:
        quantized = "base_nf4" if name == "codes" else "quant_constants"
        yield "base_unquantized" if linear.quantization == "none" else quantized, getattr(linear, name)
    if linear.bias is not None:
        yield "base_unquantized", linear.bias


def static_bytes(run: Run) -> dict[str, int]:
    """Bytes of each of STATIC."""
    counted = dict.fromkeys(STATIC, 0)
    for component, tensor in static_tensors(run):
        counted[component] += tensor.nbytes
    return counted


def write_memory(path: Path, plan: dict[str, Any] | None, run: Run, before_bytes: int) -> None:
    """Write `{"planned": {...}, "measured": {...}, "ratio": {...}}`; bytes throughout, ratios are measured / planned.

    Args:
        plan: what `plan --json` says of the run.
        before_bytes: what the process held before the base was loaded.
    """
    measured = _measured(run, before_bytes)
    planned = {key: plan[key] for key in ("components", "peak_bytes")} if plan else None
    content: dict[str, Any] = {"planned": planned, "measured": measured}
    if planned is not None:
        counted = measured["components"] | {"peak": measured["peak_bytes"]}
        expected = planned["components"] | {"peak": planned["peak_bytes"]}
        content["ratio"] = {name: counted[name] / expected[name] for name in counted if expected[name]}
    files.write_json(path, content)


def _measured(run: Run, before_bytes: int) -> dict[str, Any]:
    """Bytes at the peak: of all components if a step was followed, else of those that stay.

    `runtime` is what is there beside tensors: on an accelerator the context and the allocator's slack, on a CPU what
    the process holds more, from the kernels' own code to holes in the heap.
    """
    device, peak = run.base.device, peak_bytes(run.base.device)
    measured: dict[str, Any] = {"device": device.type}
    if device.type == "cpu":
        peak -= before_bytes
        measured["interpreter_bytes"] = before_bytes
    runtime = 0 if device.type == "cpu" else runtime_bytes(device)
    if run.peak is None:
        components = static_bytes(run) | ({"runtime": runtime} if runtime else {})
    else:
        components = with_unseen(run.peak.components, device, peak)
        measured |= {"followed_step": run.peak.step, "peak_at": run.peak.place, "other_bytes": components.pop(OTHER)}
    return measured | {"peak_bytes": peak + runtime, "components": components}


def with_unseen(followed: Mapping[str, int], device: torch.device, total_bytes: int) -> dict[str, int]:
    """What a tracker saw at a peak, and what it could not: up to the process' growth on a CPU `runtime`; on an
    accelerator up to the allocator's peak OTHER, and beside that the context.
    """
    unseen = total_bytes - sum(followed.values())
    if device.type == "cpu":
        return {**followed, "runtime": followed["runtime"] + unseen}
    return {**followed, OTHER: followed[OTHER] + unseen, "runtime": followed["runtime"] + runtime_bytes(device)}


@contextlib.contextmanager
def explained(run: Run) -> Iterator[None]:
    """Within the with-block, running out of memory is a BudgetError that says what holds it and what would fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        reason = str(problem).partition("\n")[0] or type(problem).__name__
    else:
        return
    raise _out_of_memory(run, reason) from None


def _out_of_memory(run: Run, reason: str) -> BudgetError:
    """What holds the memory, and the smallest changes that fit.

    The step needs more than the device could give, so a plan for less than that was wrong by at least their ratio: what
    it could give, scaled by planned / needed, is at most the planned peak. Where more was planned than it could give,
    that is the limit. The changes are planned to SHORT_OF of the smaller of the two.
    """
    run.optimizer.zero_grad(set_to_none=True)
    held = {name: count for name, count in static_bytes(run).items() if count}
    change = in_rows(run.recipe, run.rows) | {"memory.micro_batches_together": run.together}
    recipe = changed(run.recipe, change)
    plan = make_plan(recipe)
    given = attainable_bytes(run.base.device) + plan.device.runtime_bytes
    limit = int(SHORT_OF * min(plan.peak_bytes, given))
    return BudgetError(
        "\n  ".join(
            [
                f"out of memory in step {run.progress.step + 1}: {reason}",
                "held all through: " + ", ".join(f"{name} {format_bytes(count)}" for name, count in held.items()),
                "the rest are activations, logits and gradients; "
                f"planned peak {format_bytes(plan.peak_bytes)} of {format_bytes(given)} that there are",
                *(f"less memory with: {line}" for line in changes_that_fit(plan.placed(recipe), limit)),
            ]
        )
    )


def memory_lines(path: Path) -> list[str]:
    """A run's `memory.json` for people: one line, and the components below it if there was a plan."""
    memory = json.loads(path.read_text())
    measured = memory["measured"]["peak_bytes"]
    if memory["planned"] is None:
        return [f"peak memory {format_bytes(measured)}"]
    planned = memory["planned"]["peak_bytes"]
    peak = f"peak memory {format_bytes(measured)} measured, {format_bytes(planned)} planned"
    other = {OTHER: memory["measured"].get("other_bytes", 0)}
    return [peak, *comparison(memory["planned"]["components"], memory["measured"]["components"] | other)]
