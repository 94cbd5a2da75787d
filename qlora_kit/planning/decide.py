"""What every `auto` of a recipe's memory section comes to on a device: where things live, and what is traded for time.

Why: the switches change no bit of a result, so which of them to use follows from the budget alone.
How, the cheapest in time first:
1. everything on the device; else embedding and head elsewhere; else blocks in host memory, or else on disk, some of
   them in host memory. Of blocks that are streamed as many stay resident as fit, and as many micro-batches pass
   together as it takes for a block's compute to cover its fetch.
2. memory that is left over: fewer recomputed blocks, then weights kept dequantized, then micro-batches together where
   they are short.
Every step is tried by planning it. Imports no torch. Imported by planning/planner.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_kit.errors import RecipeError
from qlora_kit.planning import components
from qlora_kit.planning.hardware import Device, host_memory_bytes
from qlora_kit.planning.phases import away_bytes, offloaded_bytes, peak_bytes
from qlora_kit.planning.quantities import (
    host_blocks,
    is_quantized,
    recomputed_blocks,
    resident_blocks,
    together,
    tokens,
    value_bytes,
)
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.planning.trained import trained_whole_table
from qlora_kit.recipe import Memory, Recipe

RESIDENT_SHARE = 0.95  # of the device's memory that may be filled up: what is planned is not all that a device holds
HOST_SHARE = 0.8  # of the host's memory that weights and block inputs may take
# Tokens from which on a block's compute takes longer than its fetch, or its dequantization. Rough: 2 operations a
# weight and token at 100 TFLOP/s against half a byte a weight at 25 GB/s over PCIe, and at 3 GB/s from a disk.
COVERED_FROM_TOKENS = {"device": 1024, "host": 1024, "disk": 8192}


def decided(shapes: ModelShapes, recipe: Recipe, device: Device) -> Recipe:
    """The recipe with every `auto` of `memory` decided but the budget.

    On a CPU the host's memory is the device's, so what a recipe puts there stays on the device.
    If nothing fits, the choice that needs least: suggestions then say what else would help.
    """
    recipe = _on_cpu(recipe) if device.kind == "cpu" else recipe
    placed = _placed(shapes, recipe, device)
    return _spent(shapes, recipe.memory, placed, device)


def with_memory(recipe: Recipe, **keys: Any) -> Recipe:
    """The recipe with keys of its memory section set; their values are not checked."""
    return recipe.model_copy(update={"memory": recipe.memory.model_copy(update=keys)})


def _on_cpu(recipe: Recipe) -> Recipe:
    memory = recipe.memory
    on_device = {name: "device" for name in ("placement", "embeddings") if getattr(memory, name) == "host"}
    offload = False if memory.activation_offload == "host" else memory.activation_offload
    return with_memory(recipe, **on_device, activation_offload=offload, host_blocks=0)


# ----------------------------------------------------------------------------------------------- where things live


def _placed(shapes: ModelShapes, recipe: Recipe, device: Device) -> Recipe:
    """Placement, embeddings, resident and host blocks decided, and the micro-batches that a fetch is shared by."""
    tried: list[Recipe] = []
    for placement in _choices(recipe.memory.placement, device):
        options = [
            _filled(shapes, with_memory(recipe, placement=placement, embeddings=embeddings), device)
            for embeddings in _homes_of_tables(shapes, recipe, device)
        ]
        fitting = [option for option in options if _fits(shapes, recipe.memory, option, device)]
        if fitting:
            return min(fitting, key=lambda option: _fetch_cost(shapes, option))
        tried += options
    return min(tried, key=lambda option: peak_bytes(shapes, option, device))


def _homes_of_tables(shapes: ModelShapes, recipe: Recipe, device: Device) -> list[str]:
    """Where embedding and head may live. Raises: RecipeError: elsewhere, although one of them is trained whole."""
    wanted, trained = recipe.memory.embeddings, trained_whole_table(shapes, recipe.adapter)
    if trained is None:
        return _choices(wanted, device)
    if wanted in ("host", "disk"):
        raise RecipeError(
            f"memory.embeddings: found {wanted}, but {trained!r} is trained whole (adapter.modules_to_save), which "
            "takes the device; set auto or device, or give it LoRA: name it in adapter.target_modules"
        )
    return ["device"]


def _choices(wanted: str, device: Device) -> list[str]:
    """Where something may live, the fastest first."""
    if wanted != "auto":
        return [wanted]
    return ["device", "disk"] if device.kind == "cpu" else ["device", "host", "disk"]


def _fits(shapes: ModelShapes, wanted: Memory, option: Recipe, device: Device) -> bool:
    """Whether it fits on the device, and what `auto` would put into host memory there."""
    chosen = "host" not in (wanted.placement, wanted.embeddings) and wanted.host_blocks == "auto"
    if chosen and _host_bytes(shapes, option, device) > HOST_SHARE * host_memory_bytes():
        return False
    return peak_bytes(shapes, option, device) <= device.memory_bytes


def _host_bytes(shapes: ModelShapes, recipe: Recipe, device: Device) -> int:
    return away_bytes(shapes, recipe, device) + offloaded_bytes(shapes, recipe, device)


def _fetch_cost(shapes: ModelShapes, recipe: Recipe) -> int:
    """Bytes that an optimizer step fetches, weighed by how slow their source is.

    A block twice for each group of micro-batches, in forward and backward; the head once.
    """
    streamed, on_host = shapes.layers - resident_blocks(shapes, recipe), host_blocks(shapes, recipe)
    weight = COVERED_FROM_TOKENS
    blocks = on_host * weight["host"] + (streamed - on_host) * weight["disk"]
    cost = 2 * components.block_weights(shapes, recipe) * blocks
    if components.fetches_head(recipe):
        head = shapes.vocabulary * shapes.hidden * value_bytes(recipe)
        cost += head * weight[recipe.memory.embeddings]
    return -(-recipe.train.grad_accumulation // together(recipe)) * cost


def _filled(shapes: ModelShapes, recipe: Recipe, device: Device) -> Recipe:
    """Of an option the residents and the group decided, everything else of what is `auto` at its least."""
    memory, option = recipe.memory, recipe
    for group in _groups(recipe, _covered_from(recipe, device)):
        option = with_memory(recipe, micro_batches_together=group)
        if memory.placement == "device":
            option = with_memory(option, resident_blocks=shapes.layers)
        elif memory.resident_blocks == "auto":
            option = with_memory(option, resident_blocks=_most_resident(shapes, option, device))
        if peak_bytes(shapes, option, device) <= _room(device):
            break
    return with_memory(option, host_blocks=_most_on_host(shapes, option, device))


def _covered_from(recipe: Recipe, device: Device) -> int:
    """Tokens that a fetch is to be shared by. A CPU's compute is slow beside any source: there it is dequantization."""
    source = recipe.memory.placement if recipe.memory.placement != "device" else recipe.memory.embeddings
    if source == "device":
        return 1
    return COVERED_FROM_TOKENS["device" if device.kind == "cpu" else source]


def _groups(recipe: Recipe, covered_from: int) -> Iterator[int]:
    """Micro-batches together: as few as have so many tokens, then fewer, down to 1; or what the recipe says."""
    wanted = recipe.memory.micro_batches_together
    if wanted != "auto":
        yield together(recipe)
        return
    group = min(-(-covered_from // tokens(recipe)), recipe.train.grad_accumulation)
    while group > 1:
        yield group
        group = -(-group // 2) if group > 2 else 1
    yield 1


def _room(device: Device) -> float:
    """Bytes that may be filled up with what saves time."""
    return min(device.memory_bytes, RESIDENT_SHARE * device.installed_bytes)


def _most_resident(shapes: ModelShapes, recipe: Recipe, device: Device) -> int:
    """Most resident blocks that there is room for, at least one streamed; 0 if there is none for any."""
    few, many = 0, shapes.layers - 1
    while few < many:
        middle = -(-(few + many) // 2)
        there = peak_bytes(shapes, with_memory(recipe, resident_blocks=middle), device) <= _room(device)
        few, many = (middle, many) if there else (few, middle - 1)
    return few


def _most_on_host(shapes: ModelShapes, recipe: Recipe, device: Device) -> int:
    """Streamed blocks in host memory; on a CPU none, and all of them with placement `host`."""
    if recipe.memory.placement != "disk" or recipe.memory.host_blocks != "auto":
        return host_blocks(shapes, recipe)
    without = _host_bytes(shapes, with_memory(recipe, host_blocks=0), device)
    free = max(0, int(HOST_SHARE * host_memory_bytes()) - without)
    streamed = shapes.layers - resident_blocks(shapes, recipe)
    few, many = 0, min(streamed, free // components.slot_bytes(shapes, recipe))
    while few < many:
        middle = -(-(few + many) // 2)
        there = components.pinned_blocks(shapes, recipe, middle) <= free
        few, many = (middle, many) if there else (few, middle - 1)
    return few


# ------------------------------------------------------------------------------------------- memory that is left over


def _spent(shapes: ModelShapes, wanted: Memory, recipe: Recipe, device: Device) -> Recipe:
    """The switches that trade memory for time, in order of what they save."""
    recipe = with_memory(recipe, micro_batches_together=together(recipe))
    if wanted.gradient_checkpointing == "auto":
        recipe = with_memory(recipe, gradient_checkpointing=_fewest_recomputed(shapes, recipe, device))
    if wanted.keep_dequantized == "auto":
        recipe = with_memory(recipe, keep_dequantized=_keeps_dequantized(shapes, recipe, device))
    if wanted.micro_batches_together == "auto" and recipe.memory.placement == recipe.memory.embeddings == "device":
        recipe = _grouped(shapes, recipe, device)
    return recipe


def _has_room(shapes: ModelShapes, recipe: Recipe, device: Device) -> bool:
    return peak_bytes(shapes, recipe, device) <= _room(device)


def _fewest_recomputed(shapes: ModelShapes, recipe: Recipe, device: Device) -> int | bool:
    """Blocks to recompute, as few as there is room for; a truth value where it is all or none."""
    few, many = 0, shapes.layers
    while few < many:
        middle = (few + many) // 2
        there = _has_room(shapes, with_memory(recipe, gradient_checkpointing=middle), device)
        few, many = (few, middle) if there else (middle + 1, many)
    return bool(few) if few in (0, shapes.layers) else few


def _keeps_dequantized(shapes: ModelShapes, recipe: Recipe, device: Device) -> bool:
    """Whether it spares anything, and there is room."""
    spares = recomputed_blocks(shapes, recipe) > 0 or together(recipe) > 1
    return spares and is_quantized(recipe) and _has_room(shapes, with_memory(recipe, keep_dequantized=True), device)


def _grouped(shapes: ModelShapes, recipe: Recipe, device: Device) -> Recipe:
    """Short micro-batches together, so that a weight is dequantized for more tokens, if there is room."""
    covered_from = COVERED_FROM_TOKENS["device"] if is_quantized(recipe) else 1
    for group in _groups(with_memory(recipe, micro_batches_together="auto"), covered_from):
        option = with_memory(recipe, micro_batches_together=group)
        if _has_room(shapes, option, device):
            return option
    return recipe
