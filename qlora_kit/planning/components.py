"""The ledger's formulas: bytes of the components of a run, from shapes and recipe alone.

Why: planner, trainer, profiler and reports speak of the same ten components; this file says what each one holds.
How: each component is one short function of (shapes, recipe). The static ones are exact to the byte, and tests hold
them to bitsandbytes' own tensors; logits and what is around the head are counted from what the loss allocates.
Activations have a file of their own; what is there at the same moment is put together in planning/moments.
Imports no torch. Imported by planning; by base, training and export for the sizes of chunks and slabs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod

from qlora_kit.architecture_parts import LinearShape
from qlora_kit.optimizers import OPTIMIZERS
from qlora_kit.planning.quantities import (
    DTYPE_BYTES,
    FP32,
    is_quantized,
    recomputed_blocks,
    resident_blocks,
    target_sides,
    together,
    tokens,
    value_bytes,
    vocabulary_parameters,
)
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.planning.trained import TABLE_ROWS, trained_branches, trained_sizes, trained_whole
from qlora_kit.recipe import Recipe

COMPONENTS = (
    "base_nf4",
    "quant_constants",
    "base_unquantized",
    "adapter",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "workspace",
    "runtime",
)
QUANT_BLOCK = 64  # weights that share one absmax (Dettmers et al. 2023, section 3)
CONSTANT_BLOCK = 256  # absmax values that share one fp32 scale under double quantization (same section)
AUTO_LOSS_CHUNK_TOKENS = 512
LOSS_CHUNK_VOCABULARY = 16384  # rows of the head that are used at a time
SLAB_BYTES = 4 << 30  # of pinned memory in one allocation
SLOTS = 2  # buffers of `base.streaming`: one block computes, the next arrives
ALIGNMENT = 256  # bytes, of tensors in slots and in the workspace: what kernels want of a tensor's start

Ledger = dict[str, int]


def loss_chunk_tokens(recipe: Recipe) -> int:
    """Positions whose logits exist at a time, what `auto` and `full` mean being decided here."""
    wanted = recipe.memory.loss_chunk_tokens
    if wanted == "full":
        return tokens(recipe)
    return min(AUTO_LOSS_CHUNK_TOKENS if wanted == "auto" else wanted, tokens(recipe))


# ------------------------------------------------------------------------------------- static, exact to the byte


def block_weights(shapes: ModelShapes, recipe: Recipe) -> int:
    """Bytes of one block's linears as they are stored, what travels when a block is brought in."""
    if not is_quantized(recipe):
        return shapes.block_linear_parameters * value_bytes(recipe)
    offset = FP32 if recipe.model.double_quant else 0
    return sum(-(-item.weights // 2) + _constants(item, recipe.model.double_quant) - offset for item in shapes.linears)


def slot_bytes(shapes: ModelShapes, recipe: Recipe) -> int:
    """Bytes of one block's linears where it is streamed from or to, with the alignment of its tensors."""
    tensors = 3 if recipe.model.double_quant else 2  # codes, absmax, its scales
    return block_weights(shapes, recipe) + ALIGNMENT * (tensors if is_quantized(recipe) else 1) * len(shapes.linears)


def slots(shapes: ModelShapes, recipe: Recipe) -> int:
    """Device buffers that blocks which live elsewhere are brought into."""
    away = shapes.layers - resident_blocks(shapes, recipe)
    return min(away, SLOTS) * slot_bytes(shapes, recipe)


def blocks_of_a_slab(size_bytes: int, count: int) -> int:
    """How many of `count` blocks should share one pinned allocation of at most SLAB_BYTES: the best used, then most."""

    def used(number: int) -> tuple[float, int]:
        return number * size_bytes / pinned(number * size_bytes), number

    return max(range(1, max(1, min(count, SLAB_BYTES // size_bytes)) + 1), key=used)


def pinned(size_bytes: int) -> int:
    """What torch's allocator of pinned host memory takes for a request: the smallest power of two that is not less."""
    return 1 << (size_bytes - 1).bit_length() if size_bytes else 0


def pinned_blocks(shapes: ModelShapes, recipe: Recipe, count: int) -> int:
    """Pinned host memory of so many blocks."""
    size_bytes, taken = slot_bytes(shapes, recipe), 0
    while count:
        shared = blocks_of_a_slab(size_bytes, count)
        taken, count = taken + pinned(shared * size_bytes), count - shared
    return taken


def base_nf4(shapes: ModelShapes, recipe: Recipe) -> int:
    """Packed 4-bit codes of the linears of all blocks: two weights a byte, the last one alone if they are odd.

    Source: bitsandbytes `quantize_4bit`; the same for fp4. Zero when the base is not quantized.
    """
    if not is_quantized(recipe):
        return 0
    return resident_blocks(shapes, recipe) * sum(-(-linear.weights // 2) for linear in shapes.linears)


def _constants(linear: LinearShape, double_quant: bool) -> int:
    blocks = -(-linear.weights // QUANT_BLOCK)
    if not double_quant:
        return FP32 * blocks
    return blocks + FP32 * -(-blocks // CONSTANT_BLOCK) + FP32


def quant_constants(shapes: ModelShapes, recipe: Recipe) -> int:
    """Scales of the 4-bit codes.

    One fp32 absmax per 64 weights (0.5 bit a weight); with double quantization one byte each, one fp32 scale per 256
    of them, and one fp32 offset a tensor (0.127 bit). The two code tables are shared by all tensors and not counted.
    Source: Dettmers et al. 2023 (arXiv:2305.14314), section 3; bitsandbytes `quantize_4bit(compress_statistics=True)`.
    """
    if not is_quantized(recipe):
        return 0
    constants = sum(_constants(linear, recipe.model.double_quant) for linear in shapes.linears)
    offsets = FP32 * len(shapes.linears) if recipe.model.double_quant else 0  # these stay when a block is away
    resident = resident_blocks(shapes, recipe)
    return resident * constants + (shapes.layers - resident) * offsets


def base_unquantized(shapes: ModelShapes, recipe: Recipe) -> int:
    """Embedding, head (once if tied), norms and biases in `model.dtype`; the linears too when nothing is quantized.

    Without embedding and head where these live elsewhere, or are trained whole.
    """
    away = vocabulary_parameters(shapes) if fetches_head(recipe) else given_up(shapes, recipe)
    parameters = shapes.other_parameters - away
    if not is_quantized(recipe):
        parameters += resident_blocks(shapes, recipe) * shapes.block_linear_parameters
    return parameters * value_bytes(recipe)


def given_up(shapes: ModelShapes, recipe: Recipe) -> int:
    """Parameters of embedding and head whose own the base lets go of: trained whole; if they are tied, both of them."""
    row, whole = shapes.architecture, trained_whole(shapes, recipe.adapter.modules_to_save)
    trained = sum(f"{name}.weight" in whole for name in (row.embedding, row.head))
    return (trained // 2 if shapes.tied else trained) * shapes.vocabulary * shapes.hidden


def adapter_tensors(shapes: ModelShapes, recipe: Recipe) -> Mapping[int, int]:
    """Parameters of a trained tensor -> how many tensors have as many.

    A [rank, in] and B [out, rank] of each target, and what is trained whole, a table in pieces (`planning.trained`).
    """
    sizes = Counter({recipe.adapter.rank * side: count for side, count in target_sides(shapes, recipe).items()})
    return sizes + trained_sizes(shapes, recipe.adapter)


def trainable_parameters(shapes: ModelShapes, recipe: Recipe) -> int:
    """rank * (in + out), summed over the targets, and what is trained whole.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.2.
    """
    return sum(size * count for size, count in adapter_tensors(shapes, recipe).items())


def adapter(shapes: ModelShapes, recipe: Recipe) -> int:
    """A and B in `adapter.dtype`, and what is trained whole."""
    return trainable_parameters(shapes, recipe) * DTYPE_BYTES[recipe.adapter.dtype]


def gradients(shapes: ModelShapes, recipe: Recipe) -> int:
    """Of all that is trained, in its dtype; accumulated in place, so grad_accumulation costs nothing more."""
    return adapter(shapes, recipe)


def gradients_of(shapes: ModelShapes, recipe: Recipe, module: str) -> int:
    """The part of them that is a module's outside the linears of the blocks: embedding's, head's."""
    sizes = trained_sizes(shapes, recipe.adapter, module)
    return DTYPE_BYTES[recipe.adapter.dtype] * sum(size * count for size, count in sizes.items())


def optimizer(shapes: ModelShapes, recipe: Recipe) -> int:
    """Both moments of every trained tensor, by the row of OPTIMIZERS, and the lower halves of master weights.

    Paged state counts as if it lay on the device. The lower halves, 2 bytes a trained parameter, always do.
    """
    row, lower_bytes, dtype_bytes = OPTIMIZERS[recipe.train.optimizer], 0, DTYPE_BYTES[recipe.adapter.dtype]
    if recipe.keeps_master_weights:
        lower_bytes, dtype_bytes = FP32 - dtype_bytes, FP32
    tensors = adapter_tensors(shapes, recipe).items()
    return sum(count * (row.state_bytes(size, dtype_bytes) + lower_bytes * size) for size, count in tensors)


def in_optimizer_step(shapes: ModelShapes, recipe: Recipe) -> int:
    """What a step makes and lets go of.

    With master weights of the largest tensor its fp32 value and gradient, and the two halves that it is taken apart
    into (`training.optim`). Without them torch's own optimizer makes a denominator for all tensors at once (on a CPU it
    does not).
    """
    if recipe.keeps_master_weights:
        return 4 * FP32 * max(adapter_tensors(shapes, recipe))
    return adapter(shapes, recipe) if OPTIMIZERS[recipe.train.optimizer].in_dtype else 0


# ------------------------------------------------------------------------------------- the head, and what is reused


def logits(shapes: ModelShapes, recipe: Recipe, with_gradient: bool = True) -> int:
    """One tile of logits of `training.loss`: a chunk of tokens by a chunk of the vocabulary, worked on in place.

    An element: `model.dtype` as projected (none of its own when that is fp32) and fp32, 6 bytes with bf16, where
    transformers' loss takes 14 of all logits. Capped logits need the square of their tanh in fp32 too, for the slope.
    """
    dtype_bytes = value_bytes(recipe)
    squares = FP32 if shapes.softcap and with_gradient else 0
    per_element = (dtype_bytes if dtype_bytes < FP32 else 0) + FP32 + squares
    return loss_chunk_tokens(recipe) * min(shapes.vocabulary, LOSS_CHUNK_VOCABULARY) * per_element


def logits_made_again(shapes: ModelShapes, recipe: Recipe) -> int:
    """The same in the backward of a head that is trained: more tokens by fewer rows, at most as many."""
    wide = min(LOSS_CHUNK_VOCABULARY // TABLE_ROWS * loss_chunk_tokens(recipe), tokens(recipe))
    narrow = loss_chunk_tokens(recipe) * min(shapes.vocabulary, LOSS_CHUNK_VOCABULARY)
    return logits(shapes, recipe) * wide * min(shapes.vocabulary, TABLE_ROWS) // narrow


def fetches_head(recipe: Recipe) -> bool:
    """Whether the head lives elsewhere, by the recipe; `auto` counts as the device here: the planner decides it."""
    return recipe.memory.embeddings in ("host", "disk")


def head_slots(shapes: ModelShapes, recipe: Recipe) -> int:
    """Device buffers that chunks of a head that lives elsewhere are brought into, during a pass over it only.

    With `disk` on an accelerator there are as many pinned bytes on the host. Files whose dtype is not `model.dtype`
    make them larger or smaller by that ratio, and add one chunk as it is used; this is not counted.
    """
    if not fetches_head(recipe):
        return 0
    rows = min(LOSS_CHUNK_VOCABULARY, shapes.vocabulary)
    return min(SLOTS, -(-shapes.vocabulary // rows)) * rows * shapes.hidden * value_bytes(recipe)


def around_head(shapes: ModelShapes, recipe: Recipe) -> int:
    """What `training.loss` and the final norm hold beside the tile of logits.

    For all tokens the norm's fp32 copy, the last hidden state, and its learned rows, which become their gradient. For
    those that pass the head together (a chunk; all of them where the head is fetched) an fp32 sum and the target's row.
    For a chunk the product that is added to the sum, and its fp32 copy.
    """
    dtype_bytes, chunk = value_bytes(recipe), loss_chunk_tokens(recipe)
    together = tokens(recipe) if fetches_head(recipe) else chunk
    added = FP32 + (dtype_bytes if dtype_bytes < FP32 else 0)
    rows = (tokens(recipe) * (FP32 + 2 * dtype_bytes), together * (FP32 + dtype_bytes), chunk * added)
    return shapes.hidden * sum(rows) + widened(
        shapes, recipe, tokens(recipe) + min(LOSS_CHUNK_VOCABULARY, shapes.vocabulary)
    )


def widened(shapes: ModelShapes, recipe: Recipe, rows: int) -> int:
    """Of a head with a branch: so many hidden states with A x beside them, or rows with B beside them."""
    if shapes.architecture.head not in trained_branches(shapes, recipe.adapter.target_modules):
        return 0
    return rows * (shapes.hidden + recipe.adapter.rank) * value_bytes(recipe)


def workspace(shapes: ModelShapes, recipe: Recipe) -> int:
    """The buffer that weights are dequantized into (`base.workspace`), there all the time; none without quantization.

    It has room for the largest linear of a block in `model.dtype`, or for all of them where they are kept: from the
    recomputation to their use, or from one micro-batch to the next.
    """
    if not is_quantized(recipe):
        return 0
    kept = recomputed_blocks(shapes, recipe) > 0 or together(recipe) > 1
    if kept and recipe.memory.keep_dequantized is True:
        return sum(aligned(linear.weights * value_bytes(recipe)) for linear in shapes.linears)
    return largest_linear(shapes) * value_bytes(recipe)


def aligned(size_bytes: int) -> int:
    """`size_bytes` rounded up to a whole number of ALIGNMENT."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def largest_linear(shapes: ModelShapes) -> int:
    """Weights of the largest linear of a block."""
    return max(linear.weights for linear in shapes.linears)


def largest_tensor(shapes: ModelShapes) -> int:
    """Parameters of the largest tensor of the base."""
    others = (*shapes.outer_tensors, *shapes.block_tensors)
    return max(largest_linear(shapes), *(prod(shape) for _, shape in others))
