"""How far a recipe that fits could go: the longest rows, or the most rows at once, that would still fit.

Why: memory that is left over is worth knowing about before the run. How: what fits is what fits at its least, every
`auto` of `memory` at what needs fewest bytes, blocks and vocabulary on disk if need be; `decide` finds that, or better.
So one look at the peak is enough for each length tried: doubled until it is too much, then bisected.
Imports no torch. Imported by planning/planner, planning/suggest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qlora_kit.planning.decide import with_memory
from qlora_kit.planning.hardware import Device
from qlora_kit.planning.phases import peak_bytes
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.recipe import Memory, Recipe

SEQ_LEN_STEP = 256
SEQ_LEN_LIMIT = 1 << 20
MICRO_BATCH_LIMIT = 1 << 10


@dataclass(frozen=True)
class Room:
    """The largest values that fit, each with the other as it is: tokens of a row, and rows of a forward."""

    seq_len: int
    micro_batch: int


def room(shapes: ModelShapes, wanted: Memory, recipe: Recipe, device: Device) -> Room:
    """What fits.

    Args:
        wanted: the memory section as the user gave it: what is `auto` there may be decided anew.
        recipe: the same recipe with every `auto` decided; it fits.
    """

    def with_length(seq_len: int) -> Recipe:
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"seq_len": seq_len})})

    def with_rows(micro_batch: int) -> Recipe:
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": micro_batch})})

    def fits(changed: Recipe) -> bool:
        return least_bytes(shapes, wanted, changed, device) <= device.memory_bytes

    seq_len = largest(lambda n: fits(with_length(n)), recipe.data.seq_len, SEQ_LEN_STEP, SEQ_LEN_LIMIT)
    micro_batch = largest(lambda n: fits(with_rows(n)), recipe.train.micro_batch, 1, MICRO_BATCH_LIMIT)
    return Room(seq_len, micro_batch)


def least_bytes(shapes: ModelShapes, wanted: Memory, recipe: Recipe, device: Device) -> int:
    """The peak on the device with every `auto` of `wanted` at its least; it fits if this does.

    On a CPU `recipe` must be one that was decided: there, what it puts into host memory stays on the device.
    """
    peaks = (peak_bytes(shapes, option, device) for option in _leanest(wanted, recipe))
    least = next(peaks)
    return least if least <= device.memory_bytes else min((least, *peaks))


def _leanest(wanted: Memory, recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with every `auto` of `wanted` at its least: from disk, which is less unless slots are more."""
    least = {
        "resident_blocks": 0,
        "host_blocks": 0,
        "gradient_checkpointing": True,
        "keep_dequantized": False,
        "micro_batches_together": 1,
    }
    memory = {key: value for key, value in least.items() if getattr(wanted, key) == "auto"}
    for place in ("disk", "device"):
        options = {key: place for key in ("placement", "embeddings") if getattr(wanted, key) == "auto"}
        yield with_memory(recipe, **memory, **options)
        if not options:
            return


def largest(fits: Callable[[int], bool], start: int, step: int, limit: int) -> int:
    """The largest multiple of `step` up to `limit` that fits, or `start`, which does."""
    few, many = start, 2 * start
    while many < limit and fits(many):
        few, many = many, 2 * many
    few, many = few // step, min(many, limit) // step + 1  # in steps: fits, does not
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if fits(middle * step) else (few, middle)
    return max(start, few * step)
