"""What a step keeps on the device between forward and backward, and what one block's backward adds to it.

Why: these are the bytes that grow with tokens, and that most switches of `memory` trade for time. How: counted tensor
by tensor from what autograd saves in a block, in the docstrings; tests hold the counts to what torch saves, and the
sums to a step of the real code on the simulated accelerator. Of L blocks the first R are recomputed, the others kept.
Imports no torch. Imported by planning/moments and planning/planner.
"""

from __future__ import annotations

from qlora_kit.planning.quantities import (
    FP32,
    hidden_state,
    recomputed_blocks,
    targets,
    together,
    tokens,
    value_bytes,
)
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.recipe import Recipe

INT64 = 8
IN_FLIGHT = 2  # inputs that `training.offload` holds on the device
SLAB_INPUTS, PAGE_BYTES = 4, 4096  # and how it cuts host memory and files: `training.tiers`


# ----------------------------------------------------------------------------------------- what all blocks are given


def is_masked(shapes: ModelShapes, recipe: Recipe) -> bool:
    """Whether fused attention needs a mask: packed documents, several sequences that may be padded, or a window."""
    windowed = shapes.window is not None and recipe.data.seq_len > shapes.window
    return recipe.data.packing or recipe.train.micro_batch > 1 or windowed


def _squares(recipe: Recipe) -> int:
    """Elements of a [micro_batch, seq_len, seq_len] tensor."""
    return recipe.train.micro_batch * recipe.data.seq_len**2


def mask_bytes(shapes: ModelShapes, recipe: Recipe) -> int:
    """Attention masks, [micro_batch, 1, seq_len, seq_len]; two if some blocks look back a window only.

    Boolean where attention is fused and needs one; otherwise in `model.dtype`, always.
    """
    kinds = 1 if shapes.window is None else 2
    if shapes.architecture.eager_attention:
        return kinds * _squares(recipe) * value_bytes(recipe)
    return kinds * _squares(recipe) if is_masked(shapes, recipe) else 0


def call_arguments(shapes: ModelShapes, recipe: Recipe) -> int:
    """What transformers passes to every block beside the hidden state, of the micro-batches that pass together.

    Masks, position ids, and the cosines and sines of rotary embeddings [tokens, head width] in `model.dtype`.
    """
    row = shapes.architecture
    width = shapes.linear(row.attention_out).in_features // shapes.heads if row.rotary else 0
    per_token = INT64 + 2 * width * value_bytes(recipe)
    return together(recipe) * (mask_bytes(shapes, recipe) + tokens(recipe) * per_token)


# --------------------------------------------------------------------------------------------- one block, one passage


def _attention_values(shapes: ModelShapes, masked: bool) -> int:
    """Values a token of q, k, v as attention keeps them for its backward.

    With a mask, or without a fused kernel, key and value heads are repeated to the number of query heads first
    (transformers' `repeat_kv`). Of a fused projection v is a view, which keeps all of it alive, and attention's output
    is kept twice, before and after its heads are put side by side.
    """
    row = shapes.architecture
    query = shapes.linear(row.attention_out).in_features
    produced = sum(shapes.linear(name).out_features for name in row.attention_in)
    key = (produced - query) // 2
    if not row.rotary:
        return produced
    repeated = (masked or row.eager_attention) and key < query
    fused = len(row.attention_in) == 1
    value = query if repeated else produced if fused else key
    return query + (query if repeated else key) + value + (query if fused else 0)


def score_bytes(shapes: ModelShapes, recipe: Recipe) -> int:
    """What attention keeps that grows with seq_len squared.

    Fused: the mask, turned into `model.dtype` to be added. Otherwise the capped scores of every head in `model.dtype`,
    their softmax in fp32, and that again in `model.dtype`.
    """
    if shapes.architecture.eager_attention:
        return _squares(recipe) * shapes.heads * (2 * value_bytes(recipe) + FP32)
    return _squares(recipe) * value_bytes(recipe) if is_masked(shapes, recipe) else 0


def _norm_bytes_per_token(shapes: ModelShapes, recipe: Recipe) -> int:
    """RMS norms keep an fp32 copy of their input and one fp32 number; layer norms the input itself."""
    copies = shapes.architecture.layer_norm_copies
    if copies is not None:
        return copies * shapes.hidden * value_bytes(recipe)
    count = 0
    for name, _ in shapes.block_tensors:
        if name.endswith("norm.weight"):
            role = name.removesuffix(".weight").rpartition(".")[2]
            of_heads = role in ("q_norm", "k_norm")
            width = shapes.linear(f"self_attn.{role[0]}_proj").out_features if of_heads else shapes.hidden
            count += (width + 1) * FP32
    return count


def block_saved(shapes: ModelShapes, recipe: Recipe) -> int:
    """Bytes that autograd keeps of one block between its forward and its backward, its own input not counted.

    In `model.dtype`, a token: the input of each linear, kept once for all that share it (hidden before q, k, v and
    before the MLP, the attention's output, the MLP's product); q, k, v; `mlp_saved` tensors of the MLP's width;
    x A of each target (rank). In fp32: the norms' copies and attention's log-sum-exp, one number a head. And the mask
    or the scores. Llama-2-70B without a mask: 44.5 * hidden bytes a token. A test holds this to what torch saves.
    """
    row = shapes.architecture
    inner = shapes.linear(row.mlp_out).in_features
    inputs = (1 + row.pre_norm) * shapes.hidden + shapes.linear(row.attention_out).in_features + inner
    branch = recipe.adapter.rank * max(map(len, targets(shapes, recipe)))
    values = inputs + _attention_values(shapes, is_masked(shapes, recipe)) + row.mlp_saved * inner + branch
    log_sum_exp = 0 if row.eager_attention else FP32 * shapes.heads
    per_token = values * value_bytes(recipe) + _norm_bytes_per_token(shapes, recipe) + log_sum_exp
    return tokens(recipe) * per_token + score_bytes(shapes, recipe)


def block_transient(shapes: ModelShapes, recipe: Recipe) -> int:
    """What backward adds to `block_saved` at its highest point in a block: the largest of up to three places.

    The gradient of the block's output is not counted, it is there for as long as the block's backward runs.
    The MLP's activation function: gradients of the MLP's product and of both its factors are alive, while the product
    itself has been released; net, a token, the outputs of `mlp_in` in `model.dtype`, and the MLP's width once more
    where the function is composed of small steps.
    An RMS norm over the MLP's output: five fp32 tensors of the norm's own backward.
    Attention without a fused kernel: gradients of the softmax's output and input in fp32, while its output in
    `model.dtype` and the MLP are released.
    """
    row = shapes.architecture
    inner = shapes.linear(row.mlp_out).in_features
    produced = sum(shapes.linear(name).out_features for name in row.mlp_in) + (inner if row.mlp_saved > 3 else 0)
    in_mlp = tokens(recipe) * produced * value_bytes(recipe)
    in_norm = tokens(recipe) * shapes.hidden * 5 * FP32 if row.output_norm else 0
    return max(in_mlp, in_norm, _in_scores(shapes, recipe) if row.eager_attention else 0)


def _in_scores(shapes: ModelShapes, recipe: Recipe) -> int:
    row = shapes.architecture
    mlp = (shapes.hidden + (row.mlp_saved + 1) * shapes.linear(row.mlp_out).in_features) * value_bytes(recipe)
    norms = (1 + row.output_norm) * shapes.hidden * FP32
    grown = _squares(recipe) * shapes.heads * (2 * FP32 - value_bytes(recipe))
    return grown - tokens(recipe) * (mlp + norms)


# -------------------------------------------------------------------------------------------------------- all blocks


def offloads(recipe: Recipe) -> bool:
    """Whether the inputs of recomputed blocks leave the device."""
    return recipe.memory.activation_offload is not False


def block_inputs(shapes: ModelShapes, recipe: Recipe, blocks: int) -> int:
    """The inputs of so many blocks, [tokens, hidden] in `model.dtype` for each micro-batch that passes with others.

    Source: Chen et al. 2016 (arXiv:1604.06174); with bf16 the 2 * layers * hidden bytes a token of published runs.
    """
    return blocks * together(recipe) * hidden_state(shapes, recipe)


def recomputed_inputs(shapes: ModelShapes, recipe: Recipe) -> int:
    """The inputs of the recomputed blocks that are on the device: all, or with offload the two in flight."""
    there = block_inputs(shapes, recipe, recomputed_blocks(shapes, recipe))
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
    return recomputed_inputs(shapes, recipe) + kept_blocks(shapes, recipe) + call_arguments(shapes, recipe)


def in_kept_backward(shapes: ModelShapes, recipe: Recipe) -> int:
    """The highest point of the last block's backward where it is kept: nothing is free yet, and nothing is made again.

    With the gradient of the output of each micro-batch.
    """
    gradients = block_inputs(shapes, recipe, 1)
    return kept_activations(shapes, recipe) + gradients + block_transient(shapes, recipe)


def in_recomputed_backward(shapes: ModelShapes, recipe: Recipe) -> int:
    """The same of the last of the recomputed blocks; those that were kept are gone by then.

    With the gradients of the outputs, one recomputed passage and the output that is part of it. Gradients of the inputs
    take the place of inputs; where these are offloaded, they come on top.
    """
    gradients = block_inputs(shapes, recipe, 1)
    if offloads(recipe):
        gradients += (together(recipe) - 1) * hidden_state(shapes, recipe)
    passage = block_saved(shapes, recipe) + block_transient(shapes, recipe) + hidden_state(shapes, recipe)
    return recomputed_inputs(shapes, recipe) + call_arguments(shapes, recipe) + gradients + passage


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
    slab = _power_of_two(SLAB_INPUTS * room)
    return -(-count // (slab // room)) * slab


def offload_staging(shapes: ModelShapes, recipe: Recipe) -> int:
    """Pinned host memory that inputs pass through on their way from an accelerator to a file."""
    return _power_of_two(hidden_state(shapes, recipe)) if recipe.memory.activation_offload == "disk" else 0


def _power_of_two(size_bytes: int) -> int:
    """The smallest that is not less: what torch's allocator of pinned memory takes."""
    return 1 << (size_bytes - 1).bit_length()
