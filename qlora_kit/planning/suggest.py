"""What to change in a recipe that does not fit: lines to paste, each with what it saves and what time it costs.

Why: "out of memory" is no help; the mildest change that fits is. How: single changes are tried, the one that costs
least first; if none is enough alone, they are put together until they are. Imports no torch. Imported by
planning/planner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qlora_kit.optimizers import OPTIMIZERS
from qlora_kit.planning.hardware import Device
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


def _changes(recipe: Recipe) -> Iterator[Change]:
    """Single changes that save memory, the one that costs least first: nothing, then time, then what is learned."""
    memory, train = recipe.memory, recipe.train
    given = memory.model_dump()
    for key in ("placement", "embeddings", "resident_blocks", "loss_chunk_tokens", "keep_dequantized"):
        if given[key] not in ("auto", "host", "disk", False):
            yield {f"memory.{key}": "auto"}
    if memory.micro_batches_together not in ("auto", 1):
        yield {"memory.micro_batches_together": "auto"}
    if train.micro_batch > 1:
        yield {"train.micro_batch": 1, "train.grad_accumulation": train.grad_accumulation * train.micro_batch}
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


def suggestions(recipe: Recipe, device: Device, before: Cost, cost: Callable[[Recipe], Cost]) -> list[str]:
    """Changes that make it fit: each that does alone (the mildest of a key), else the fewest first ones together.

    Those that touch nothing of what is learned come first, of these the ones that cost least time. Every line was
    planned; if all changes together are not enough, the only line says what would be.

    Args:
        before: what the recipe takes as it is.
        cost: what a changed one does, its `auto` decided.
    """
    alone: dict[str, tuple[Change, Cost]] = {}
    for change in _changes(recipe):
        key = next(iter(change))
        if key not in alone and (after := cost(changed(recipe, change))).peak_bytes <= device.memory_bytes:
            alone[key] = (change, after)
    if not alone:
        return [_together(recipe, device, before, cost)]
    ordered = sorted(alone.values(), key=lambda found: (_learned(found[0]), round(_time(before, found[1]), 2)))
    return [_line(change, before, after) for change, after in ordered]


def _together(recipe: Recipe, device: Device, before: Cost, cost: Callable[[Recipe], Cost]) -> str:
    together: Change = {}
    least = before
    for change in _changes(recipe):
        after = cost(changed(recipe, together | change))
        if after.peak_bytes < least.peak_bytes:
            together, least = together | change, after
        if least.peak_bytes <= device.memory_bytes:
            return _line(together, before, least)
    said = f"no change of these settings makes it fit: the least is {format_bytes(least.peak_bytes)}"
    with_what = f" with {_options(together)}" if together else ""
    return f"{said}{with_what}; take a device with more memory, or a smaller model"
