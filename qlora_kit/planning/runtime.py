"""What a run takes beside its tensors: a constant of the device, and on a CPU the holes of the process' heap.

Why: a budget is held by the whole process. On an accelerator that is the context (`Device.runtime_bytes`). On a CPU:
- code and tables of the kernels, mapped in when first used, and what oneDNN compiles and keeps: a constant, too, and as
  much again for each further width of rows, of which packed rows have one (`widths`);
- where there is room, freed memory is never given back (`training.run.choose_heap`: fresh pages cost a tenth of a
  step), and glibc's heap has grown holes as large as what passes through it: activations, logits and gradients at their
  most. What blocks keep for backward counts half: it goes in the order in which it came, so that holes join.
Where it is tight, freed memory goes back at once and there are none. All three figures are measured, not derived:
`python -m tools.prove_rss`, table in `docs/memory.md`.
Imports no torch. Imported by: planning.phases, planning.planner, training.run.
"""

from __future__ import annotations

from qlora_kit.planning import activations
from qlora_kit.planning.components import Ledger
from qlora_kit.planning.hardware import Device, fixed_runtime_bytes
from qlora_kit.planning.moments import total, training_moments
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.recipe import Recipe
from qlora_kit.widths import widths

WIDTH_BYTES = 17 * 2**20  # kernels of a training step for one more width of rows
ROOMY_SHARE = 0.7  # of the budget; a plan below it leaves room for a faster, less frugal heap
PASSING = ("activations", "logits", "gradients")


def runtime_bytes(shapes: ModelShapes, recipe: Recipe, device: Device) -> int:
    """Bytes of the device that are no tensors'."""
    return _beside(shapes, recipe, device)[0] if device.kind == "cpu" else device.runtime_bytes


def is_roomy(shapes: ModelShapes, recipe: Recipe, device: Device) -> bool:
    """Whether the budget leaves room to keep freed memory; on a CPU, with the holes that come of it."""
    return _beside(shapes, recipe, device)[1]


def _beside(shapes: ModelShapes, recipe: Recipe, device: Device) -> tuple[int, bool]:
    """What both return."""
    moments = training_moments(shapes, recipe, device.runtime_bytes).values()
    highest, limit = max(map(total, moments)), ROOMY_SHARE * device.memory_bytes
    if device.kind != "cpu":
        return device.runtime_bytes, highest <= limit
    further = 0 if recipe.data.packing else WIDTH_BYTES * (widths(recipe.data.seq_len) - 1)
    holes = max(sum(ledger[name] for name in PASSING) for ledger in moments)
    holes -= activations.kept_activations(shapes, recipe) // 2
    roomy = highest + further + holes <= limit
    return device.runtime_bytes + further + (holes if roomy else 0), roomy


def is_constant(planned: Ledger) -> bool:
    """Whether a plan for a CPU counts neither on holes nor on further widths."""
    return planned["runtime"] == fixed_runtime_bytes("cpu", "cpu")
