"""`plan --stack`: the plan of a recipe as another stack would run it, with this kit's peak beside it.

Why: a user sees at a glance what moving here saves. How: the same Plan, its components from planning/stack_moments; the
kit's own peak by planning it for the same device, unless the kit cannot train the architecture. Loading, evaluation and
merging elsewhere are rough: one tensor in flight, a forward with all logits, the whole model in host memory.
Imports no torch. Imported by the command line.
"""

from __future__ import annotations

from typing import Any

from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.errors import RecipeError
from qlora_kit.planning import components
from qlora_kit.planning.hardware import Device, device_for
from qlora_kit.planning.moments import total
from qlora_kit.planning.phases import MERGED_DTYPE_BYTES, Phase
from qlora_kit.planning.planner import Plan, plan_shapes
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config
from qlora_kit.planning.stack_moments import in_stack, stack_moments, stack_peak, static_ledger
from qlora_kit.planning.stacks import STACKS
from qlora_kit.planning.suggest import changed
from qlora_kit.planning.trained import trained_sizes
from qlora_kit.recipe import Recipe


def plan_in_stack(
    recipe: Recipe,
    stack: str,
    *,
    budget_bytes: int | None = None,
    gpu: str | None = None,
    shapes: ModelShapes | None = None,
) -> Plan:
    """Plan a recipe for a stack of STACKS, from the config of its model alone.

    Args:
        budget_bytes, gpu, shapes: as `make_plan` takes them.
    Raises: ModelError: no usable config. RecipeError: unknown card, targets that select nothing, or more trained than
        LoRA on linears of the blocks, whose cost elsewhere is not known here.
    """
    if budget_bytes is None and recipe.memory.budget != "auto":
        budget_bytes = recipe.memory.budget
    if shapes is None:
        shapes = model_shapes(*read_config(recipe.model.path, recipe.model.revision), planned_only=True)
    if trained_sizes(shapes, recipe.adapter):
        raise RecipeError(
            f"--stack {stack}: what it takes to train embedding, head or norms there is not known here; leave out "
            "adapter.modules_to_save, and embedding and head of adapter.target_modules"
        )
    return plan_shapes_in_stack(shapes, recipe, stack, device_for(recipe.train.device, gpu, budget_bytes))


def plan_shapes_in_stack(shapes: ModelShapes, recipe: Recipe, stack: str, device: Device) -> Plan:
    """The same for known shapes and device."""
    there = in_stack(recipe, STACKS[stack])
    moment, ledger = stack_peak(shapes, there, STACKS[stack], device.runtime_bytes)
    return Plan(
        device=device,
        components=ledger,
        peak_moment=moment,
        moments=stack_moments(shapes, there, STACKS[stack], device.runtime_bytes),
        phases=_phases(shapes, there, stack, device),
        trainable_parameters=components.trainable_parameters(shapes, there),
        base_parameters=shapes.total_parameters,
        resident_blocks=shapes.layers,
        streamed_blocks=0,
        host_blocks=0,
        settings=_settings(there, device),
        stack=stack,
        kit_peak_bytes=plan_shapes(shapes, recipe, device).peak_bytes if shapes.model_type in ARCHITECTURES else None,
    )


def _settings(recipe: Recipe, device: Device) -> dict[str, Any]:
    placed = {"train.device": device.kind, "memory.budget": device.memory_bytes}
    return changed(recipe, placed).model_dump(mode="json")


def _phases(shapes: ModelShapes, recipe: Recipe, stack: str, device: Device) -> dict[str, Phase]:
    row, runtime = STACKS[stack], device.runtime_bytes
    static = static_ledger(shapes, recipe, row, runtime)
    base = sum(static[name] for name in ("base_nf4", "quant_constants", "base_unquantized", "runtime"))
    state, merged = static["adapter"] + static["optimizer"], shapes.total_parameters * MERGED_DTYPE_BYTES
    logits = stack_moments(shapes, recipe, row, runtime)["loss"]["logits"]
    training = total(stack_peak(shapes, recipe, row, runtime)[1])
    return {
        "load": Phase(base + components.largest_tensor(shapes) * MERGED_DTYPE_BYTES, 0, 0),
        "train": Phase(training, 0, 0),
        "eval": Phase(total(static) + logits, 0, 0),
        "save": Phase(total(static), state, state),
        "merge": Phase(0, merged, merged),
    }
