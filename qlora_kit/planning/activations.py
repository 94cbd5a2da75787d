"""All blocks: what a step keeps on the device between forward and backward, and what it keeps elsewhere.

Why: these are the bytes that grow with tokens, and that most switches of `memory` trade for time. How: of L blocks the
first R are recomputed, of these the inputs wait; the others keep all that they save (planning/block).
Imports no torch. Imported by planning/moments and planning/phases.
"""

from __future__ import annotations

from qlora_kit.planning.block import block_saved, kept_passage, mask_bytes, recomputed_passage
from qlora_kit.planning.components import pinned
from qlora_kit.planning.quantities import hidden_state, recomputed_blocks, together, tokens, value_bytes
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.recipe import Recipe

INT64 = 8
IN_FLIGHT = 2  # inputs that `training.offload` holds on the device
SLAB_INPUTS, PAGE_BYTES = 4, 4096  # and how it cuts host memory and files: `training.tiers`


def call_arguments(shapes: ModelShapes, recipe: Recipe) -> int:
    """What transformers passes to every block beside the hidden state, of the micro-batches that pass together.

    Masks, position ids, and the cosines and sines of rotary embeddings [tokens, head width] in `model.dtype`.
    """
    row = shapes.architecture
    width = shapes.linear(row.attention_out).in_features // shapes.heads if row.rotary else 0
    per_token = INT64 + 2 * width * value_bytes(recipe)
    return together(recipe) * (mask_bytes(shapes, recipe) + tokens(recipe) * per_token)


def offloads(recipe: Recipe) -> bool:
    """Whether the inputs of recomputed blocks leave the device."""
    return recipe.memory.activation_offload is not False


def block_inputs(shapes: ModelShapes, recipe: Recipe, blocks: int) -> int:
    """The inputs of so many blocks, [tokens, hidden] in `model.dtype` for each micro-batch that passes with others.

    Source: Chen et al. 2016 (arXiv:1604.06174); with bf16 the 2 * layers * hidden bytes a token of published runs.
    """
    return blocks * together(recipe) * hidden_state(shapes, recipe)


def recomputed_inputs(shapes: ModelShapes, recipe: Recipe, waiting: int) -> int:
    """The inputs of so many recomputed blocks that are on the device: all, or with offload the two in flight."""
    there = block_inputs(shapes, recipe, waiting)
    return min(there, IN_FLIGHT * hidden_state(shapes, recipe)) if offloads(recipe) else there


def kept_blocks(shapes: ModelShapes, recipe: Recipe) -> int:
    """Of the blocks that are not recomputed: what each saves, its input, and the output of the last one.

    The output of a block is the input of the next, one tensor. All is free again once these blocks' backward is done.
    """
    kept = shapes.layers - recomputed_blocks(shapes, recipe)
    if kept == 0:
        return 0
    return kept * together(recipe) * block_saved(shapes, recipe) + block_inputs(shapes, recipe, kept + 1)


def kept_activations(shapes: ModelShapes, recipe: Recipe) -> int:
    """All that forward leaves on the device for backward, the head's part not counted."""
    inputs = recomputed_inputs(shapes, recipe, recomputed_blocks(shapes, recipe))
    return inputs + kept_blocks(shapes, recipe) + call_arguments(shapes, recipe)


def in_kept_backward(shapes: ModelShapes, recipe: Recipe) -> int:
    """The highest point of the last block's backward where it is kept: nothing is free yet, and nothing is made again.

    With the gradient of the output of each micro-batch.
    """
    gradients = block_inputs(shapes, recipe, 1)
    return kept_activations(shapes, recipe) + gradients + kept_passage(shapes, recipe)


def in_recomputed_backward(shapes: ModelShapes, recipe: Recipe, waiting: int) -> int:
    """The same of a recomputed block, the last of `waiting`; those that were kept are gone by then.

    With the gradients of the outputs, and one recomputed passage. Gradients of the inputs take the place of inputs;
    where these are offloaded, they come on top.
    """
    gradients = block_inputs(shapes, recipe, 1)
    if offloads(recipe):
        gradients += (together(recipe) - 1) * hidden_state(shapes, recipe)
    around = recomputed_inputs(shapes, recipe, waiting) + call_arguments(shapes, recipe) + gradients
    return around + recomputed_passage(shapes, recipe)


# ------------------------------------------------------------------------------------------------- off the device


def offloaded_inputs(shapes: ModelShapes, recipe: Recipe, tier: str) -> int:
    """Bytes of block inputs that are kept in host memory, or in a file, if that is the tier of `activation_offload`.

    Each begins at a whole page. Host memory is taken in slabs of a power of two with room for at least four inputs.
    """
    count = recomputed_blocks(shapes, recipe) * together(recipe)
    if recipe.memory.activation_offload != tier or count == 0:
        return 0
    room = -(-hidden_state(shapes, recipe) // PAGE_BYTES) * PAGE_BYTES
    if tier == "disk":
        return count * room
    slab = pinned(SLAB_INPUTS * room)
    return -(-count // (slab // room)) * slab


def offload_staging(shapes: ModelShapes, recipe: Recipe) -> int:
    """Pinned host memory that inputs pass through on their way from an accelerator to a file."""
    return pinned(hidden_state(shapes, recipe)) if recipe.memory.activation_offload == "disk" else 0
