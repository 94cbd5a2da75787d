"""What to change in a recipe that does not fit: lines to paste, each with what it saves and what time it costs.

Why: "out of memory" is no help; the mildest change that fits is. How: single changes are tried, the one that costs
least first; if none is enough alone, they are put together until they are. A run that was planned to fit and did not
is given values, not `auto`: what that comes to was decided by the plan that was wrong. Imports no torch. Imported by
planning/planner, training/memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qlora_kit.optimizers import OPTIMIZERS
from qlora_kit.planning.hardware import Device
from qlora_kit.planning.room import SEQ_LEN_STEP, largest
from qlora_kit.recipe import Recipe
from qlora_kit.units import format_bytes

SMALLEST_SUGGESTED_SEQ_LEN = 256
SMALLEST_SUGGESTED_RANK = 8
Change = dict[str, Any]  # dotted recipe key -> value


def changed(recipe: Recipe, change: Change) -> Recipe:
    """The recipe with dotted keys set."""
    values = recipe.model_dump()
    for key, value in change.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return Recipe.model_validate(values)


def in_rows(recipe: Recipe, rows: int) -> Change:
    """Micro-batches of so many rows, and as many of them as a step has rows for."""
    rows_of_step = recipe.train.micro_batch * recipe.train.grad_accumulation
    return {"train.micro_batch": rows, "train.grad_accumulation": -(-rows_of_step // rows)}


def single_changes(recipe: Recipe) -> Iterator[Change]:
    """Single changes that save memory, the one that costs least first: nothing, then time, then what is learned."""
    memory, train = recipe.memory, recipe.train
    given = memory.model_dump()
    for key in ("placement", "embeddings", "resident_blocks", "loss_chunk_tokens", "keep_dequantized"):
        if given[key] not in ("auto", "host", "disk", False):
            yield {f"memory.{key}": "auto"}
    if memory.micro_batches_together not in ("auto", 1):
        yield {"memory.micro_batches_together": "auto"}
    rows = train.micro_batch // 2
    while rows >= 1:
        if train.micro_batch % rows == 0:
            yield in_rows(recipe, rows)
        rows //= 2
    if memory.gradient_checkpointing not in ("auto", True):
        yield {"memory.gradient_checkpointing": "auto"}
    for tier in ("host", "disk"):
        if memory.activation_offload is False:
            yield {"memory.activation_offload": tier}
    if OPTIMIZERS[train.optimizer].state_bits > 8:
        yield {"train.optimizer": "paged_adamw_8bit"}
    if recipe.model.quantization == "none":
        yield {"model.quantization": "nf4", "model.double_quant": True}
    elif not recipe.model.double_quant:
        yield {"model.double_quant": True}
    shorter = recipe.data.seq_len // 2
    while shorter >= SMALLEST_SUGGESTED_SEQ_LEN:
        yield {"data.seq_len": shorter}
        shorter //= 2
    smaller = recipe.adapter.rank // 2
    while smaller >= SMALLEST_SUGGESTED_RANK:
        yield {"adapter.rank": smaller, "adapter.alpha": recipe.adapter.alpha * smaller / recipe.adapter.rank}
        smaller //= 2


def changes_of_a_run(recipe: Recipe, decide: Callable[[Recipe], Recipe]) -> Iterator[Change]:
    """The same for a recipe without `auto`, in values: first its switches as they would be decided for less memory."""
    changes = list(single_changes(recipe))
    eased = {key: value for change in changes for key, value in change.items() if value == "auto"}
    memory = decide(changed(recipe, eased | {"memory.host_blocks": "auto"})).memory.model_dump()
    switched = {f"memory.{key}": value for key, value in memory.items() if value != getattr(recipe.memory, key)}
    if switched:
        yield switched
    yield from (change for change in changes if "auto" not in change.values())


@dataclass(frozen=True)
class Cost:
    """What a recipe takes: bytes at its highest phase on the device, and seconds a token, if its device's are known."""

    peak_bytes: int
    token_s: float | None


def _learned(change: Change) -> int:
    """How much a change touches what is learned: not at all, its rounding, the base's precision, the task itself."""
    key = next(iter(change))
    if key in ("data.seq_len", "adapter.rank"):
        return 3
    if key == "model.quantization":
        return 2
    return 1 if key in ("train.optimizer", "model.double_quant") else 0


def _time(before: Cost, after: Cost) -> float:
    """The relative change of time; 0 where it is not known."""
    return after.token_s / before.token_s - 1 if before.token_s and after.token_s else 0.0


def _line(change: Change, before: Cost, after: Cost) -> str:
    """The change as `--set` options to paste, with what it saves and costs, and the peak that it was planned to."""
    saved = f"saves {format_bytes(before.peak_bytes - after.peak_bytes)}"
    time = f", {100 * _time(before, after):+.0f} % time" if before.token_s and after.token_s else ""
    return f"{_options(change)}   ({saved}{time}: {format_bytes(after.peak_bytes)} at the peak)"


def _options(change: Change) -> str:
    return " ".join(f"--set {key}={_text(value)}" for key, value in change.items())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def suggestions(
    recipe: Recipe, changes: Iterable[Change], device: Device, before: Cost, cost: Callable[[Recipe], Cost]
) -> list[str]:
    """Changes that make it fit: each that does alone (the mildest of a key), else the fewest first ones together.

    Those that touch nothing of what is learned come first, of these the ones that cost least time. Every line was
    planned; if all changes together are not enough, the only line says what would be.

    Args:
        changes: to try: `single_changes` or `changes_of_a_run`.
        before: what the recipe takes as it is.
        cost: what a changed one does, its `auto` decided.
    """
    alone: dict[str, tuple[Change, Cost]] = {}
    changes = list(changes)
    for change in changes:
        key = next(iter(change))
        if key not in alone and (after := cost(changed(recipe, change))).peak_bytes <= device.memory_bytes:
            alone[key] = (change, after)
    if not alone:
        return [_together(recipe, changes, device, before, cost)]
    if "data.seq_len" in alone:
        longest = _longest(recipe, alone["data.seq_len"][0]["data.seq_len"], device, cost)
        alone["data.seq_len"] = ({"data.seq_len": longest}, cost(changed(recipe, {"data.seq_len": longest})))
    ordered = sorted(alone.values(), key=lambda found: (_learned(found[0]), round(_time(before, found[1]), 2)))
    return [_line(change, before, after) for change, after in ordered]


def _longest(recipe: Recipe, fitting: int, device: Device, cost: Callable[[Recipe], Cost]) -> int:
    """The longest seq_len that fits, in steps; `fitting` does."""

    def fits(seq_len: int) -> bool:
        return cost(changed(recipe, {"data.seq_len": seq_len})).peak_bytes <= device.memory_bytes

    return largest(fits, fitting, SEQ_LEN_STEP, recipe.data.seq_len - 1)


def _together(
    recipe: Recipe, changes: list[Change], device: Device, before: Cost, cost: Callable[[Recipe], Cost]
) -> str:
    together: Change = {}
    least = before
    for change in changes:
        after = cost(changed(recipe, together | change))
        if after.peak_bytes < least.peak_bytes:
            together, least = together | change, after
        if least.peak_bytes <= device.memory_bytes:
            return _line(together, before, least)
    said = f"no change of these settings makes it fit: the least is {format_bytes(least.peak_bytes)}"
    with_what = f" with {_options(together)}" if together else ""
    return f"{said}{with_what}; take a device with more memory, or a smaller model"
