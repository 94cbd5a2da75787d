"""What a recipe comes to for one model, in the numbers that several formulas of the ledger need.

Why: how many blocks are resident, kept or recomputed, how many micro-batches wait together, what a hidden state takes:
each is said once. `auto` counts as what costs least memory: the planner decides it (`decide.decided`).
Imports no torch. Imported by the other formulas of planning.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from qlora_kit.architecture_parts import LinearShape
from qlora_kit.planning.shapes import ModelShapes, select_targets
from qlora_kit.recipe import Recipe

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FP32 = 4


def tokens(recipe: Recipe) -> int:
    """Positions of one forward: micro_batch sequences, each as long as it may be."""
    return recipe.train.micro_batch * recipe.data.seq_len


def value_bytes(recipe: Recipe) -> int:
    """Bytes of one value in `model.dtype`."""
    return DTYPE_BYTES[recipe.model.dtype]


def hidden_state(shapes: ModelShapes, recipe: Recipe) -> int:
    """Bytes of a block's input, or output, of one micro-batch: [tokens, hidden] in `model.dtype`."""
    return tokens(recipe) * shapes.hidden * value_bytes(recipe)


def is_quantized(recipe: Recipe) -> bool:
    """Whether the linears of the blocks are stored in 4 bits."""
    return recipe.model.quantization != "none"


def together(recipe: Recipe) -> int:
    """Micro-batches that pass each block together."""
    wanted = recipe.memory.micro_batches_together
    return 1 if wanted == "auto" else min(wanted, recipe.train.grad_accumulation)


def recomputed_blocks(shapes: ModelShapes, recipe: Recipe) -> int:
    """Blocks that run again in backward, the first ones; the others keep their activations."""
    wanted = recipe.memory.gradient_checkpointing
    if isinstance(wanted, bool) or wanted == "auto":
        return shapes.layers if wanted else 0
    return min(wanted, shapes.layers)


def resident_blocks(shapes: ModelShapes, recipe: Recipe) -> int:
    """Blocks whose linears live on the device."""
    if recipe.memory.placement in ("auto", "device"):
        return shapes.layers
    wanted = recipe.memory.resident_blocks
    return 0 if wanted == "auto" else min(wanted, shapes.layers)


def host_blocks(shapes: ModelShapes, recipe: Recipe) -> int:
    """Streamed blocks whose linears live in host memory: all of them with placement `host`, some with `disk`."""
    streamed = shapes.layers - resident_blocks(shapes, recipe)
    wanted = recipe.memory.host_blocks
    if recipe.memory.placement != "disk":
        return streamed
    return 0 if wanted == "auto" else min(wanted, streamed)


def vocabulary_parameters(shapes: ModelShapes) -> int:
    """Parameters of embedding and head, one tensor if they are tied."""
    return shapes.vocabulary * shapes.hidden * (1 if shapes.tied else 2)


@lru_cache(maxsize=8)
def _selected(shapes: ModelShapes, target_modules: str | tuple[str, ...]) -> list[list[LinearShape]]:
    return select_targets(shapes, target_modules)


@lru_cache(maxsize=8)
def _sides(shapes: ModelShapes, target_modules: str | tuple[str, ...]) -> Counter[int]:
    linears = [linear for block in _selected(shapes, target_modules) for linear in block]
    return Counter(side for linear in linears for side in (linear.in_features, linear.out_features))


@lru_cache(maxsize=8)
def _different(shapes: ModelShapes, target_modules: str | tuple[str, ...]) -> list[list[LinearShape]]:
    return [list(block) for block in dict.fromkeys(map(tuple, _selected(shapes, target_modules)))]


def _wanted(recipe: Recipe) -> str | tuple[str, ...]:
    wanted = recipe.adapter.target_modules
    return wanted if isinstance(wanted, str) else tuple(wanted)


def targets(shapes: ModelShapes, recipe: Recipe) -> list[list[LinearShape]]:
    """The targeted linears of each block. Raises: RecipeError: a target selects nothing."""
    return _selected(shapes, _wanted(recipe))


def target_sides(shapes: ModelShapes, recipe: Recipe) -> Counter[int]:
    """Inputs and outputs of all targeted linears: how often each width occurs."""
    return _sides(shapes, _wanted(recipe))


def selections(shapes: ModelShapes, recipe: Recipe) -> list[list[LinearShape]]:
    """The targeted linears of a block, each different selection once: in most recipes blocks are alike."""
    return _different(shapes, _wanted(recipe))
