"""What to change in a recipe that does not fit: lines to paste, each with the peak that it was planned to.

Why: "out of memory" is no help; the mildest change that fits is. How: single changes are tried, the one that costs
least first; if none is enough alone, they are put together until they are. Imports no torch. Imported by
planning/planner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def _line(change: Change, peak_bytes: int) -> str:
    """The change as `--set` options to paste, with the peak that it was planned to."""
    return f"{_options(change)}   ({format_bytes(peak_bytes)} at the peak)"


def _options(change: Change) -> str:
    return " ".join(f"--set {key}={_text(value)}" for key, value in change.items())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def suggestions(recipe: Recipe, device: Device, needed: Callable[[Recipe], int]) -> Iterator[str]:
    """Changes that make it fit: each that does alone (the mildest of a key), else the fewest first ones together.

    Every line was planned; if all of them together are not enough, the last line says what would be.

    Args:
        needed: peak bytes on the device of a recipe, its `auto` decided.
    """
    alone: set[str] = set()
    for change in _changes(recipe):
        key, peak = next(iter(change)), needed(changed(recipe, change))
        if key not in alone and peak <= device.memory_bytes:
            alone.add(key)
            yield _line(change, peak)
    if not alone:
        yield _together(recipe, device, needed)


def _together(recipe: Recipe, device: Device, needed: Callable[[Recipe], int]) -> str:
    together: Change = {}
    smallest = needed(recipe)
    for change in _changes(recipe):
        peak = needed(changed(recipe, together | change))
        if peak < smallest:
            together, smallest = together | change, peak
        if smallest <= device.memory_bytes:
            return _line(together, smallest)
    least = f"no change of these settings makes it fit: the least is {format_bytes(smallest)}"
    with_what = f" with {_options(together)}" if together else ""
    return f"{least}{with_what}; take a device with more memory, or a smaller model"
