"""The ledger's formulas: bytes of every component of a run, from shapes and recipe alone.

Why: planner, trainer, profiler and reports speak of the same ten components; this file says what each one holds.
How: each component is one short function of (shapes, recipe). The static ones are exact to the byte, and tests hold
them to bitsandbytes' own tensors. Activations, logits and workspace are estimates: they follow from what autograd
saves in a block, counted tensor by tensor in the docstrings; a test holds the count to what torch saves.
The training peak is the maximum over moments, not a sum: the loss (tile of logits) or one block's recomputation
and backward, whichever is larger. Imports no torch. Imported by planning/planner.py, and by training and profiling.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod

from qlora_kit.architectures import LinearShape
from qlora_kit.optimizers import OPTIMIZERS
from qlora_kit.planning.shapes import ModelShapes, select_targets
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
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
QUANT_BLOCK = 64  # weights that share one absmax (Dettmers et al. 2023, section 3)
CONSTANT_BLOCK = 256  # absmax values that share one fp32 scale under double quantization (same section)
AUTO_LOSS_CHUNK_TOKENS = 512
LOSS_CHUNK_VOCABULARY = 16384  # rows of the head that are used at a time
SLOTS = 2  # buffers of `base.streaming`: one block computes, the next arrives
SLOT_ALIGNMENT = 256
FP32 = 4

Ledger = dict[str, int]


def tokens(recipe: Recipe) -> int:
    """Positions of one forward: micro_batch sequences, each as long as it may be."""
    return recipe.train.micro_batch * recipe.data.seq_len


def loss_chunk_tokens(recipe: Recipe) -> int:
    """Positions whose logits exist at a time, what `auto` and `full` mean being decided here."""
    wanted = recipe.memory.loss_chunk_tokens
    if wanted == "full":
        return tokens(recipe)
    return min(AUTO_LOSS_CHUNK_TOKENS if wanted == "auto" else wanted, tokens(recipe))


def _dtype_bytes(recipe: Recipe) -> int:
    return DTYPE_BYTES[recipe.model.dtype]


def _quantized(recipe: Recipe) -> bool:
    return recipe.model.quantization != "none"


# ------------------------------------------------------------------------------------- static, exact to the byte


def resident_blocks(shapes: ModelShapes, recipe: Recipe) -> int:
    """Blocks whose linears live on the device; `resident_blocks: auto` counts as none here: the planner decides it."""
    if recipe.memory.placement in ("auto", "device"):
        return shapes.layers
    wanted = recipe.memory.resident_blocks
    return 0 if wanted == "auto" else min(wanted, shapes.layers)


def block_weights(shapes: ModelShapes, recipe: Recipe) -> int:
    """Bytes of one block's linears as they are stored, what travels when a block is brought in."""
    if not _quantized(recipe):
        return shapes.block_linear_parameters * _dtype_bytes(recipe)
    offset = FP32 if recipe.model.double_quant else 0
    return sum(-(-item.weights // 2) + _constants(item, recipe.model.double_quant) - offset for item in shapes.linears)


def slots(shapes: ModelShapes, recipe: Recipe) -> int:
    """Device buffers that blocks which live elsewhere are brought into, and the alignment of their tensors."""
    away = shapes.layers - resident_blocks(shapes, recipe)
    aligned = block_weights(shapes, recipe) + SLOT_ALIGNMENT * 3 * len(shapes.linears)
    return min(away, SLOTS) * aligned


def base_nf4(shapes: ModelShapes, recipe: Recipe) -> int:
    """Packed 4-bit codes of the linears of all blocks: two weights a byte, the last one alone if they are odd.

    Source: bitsandbytes `quantize_4bit`; the same for fp4. Zero when the base is not quantized.
    """
    if not _quantized(recipe):
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
    if not _quantized(recipe):
        return 0
    constants = sum(_constants(linear, recipe.model.double_quant) for linear in shapes.linears)
    offsets = FP32 * len(shapes.linears) if recipe.model.double_quant else 0  # these stay when a block is away
    resident = resident_blocks(shapes, recipe)
    return resident * constants + (shapes.layers - resident) * offsets


def base_unquantized(shapes: ModelShapes, recipe: Recipe) -> int:
    """Embedding, head (once if tied), norms and biases in `model.dtype`; the linears too when nothing is quantized."""
    parameters = shapes.other_parameters
    if not _quantized(recipe):
        parameters += resident_blocks(shapes, recipe) * shapes.block_linear_parameters
    return parameters * _dtype_bytes(recipe)


@lru_cache(maxsize=8)
def _selected(shapes: ModelShapes, target_modules: str | tuple[str, ...]) -> list[list[LinearShape]]:
    return select_targets(shapes, target_modules)


def targets(shapes: ModelShapes, recipe: Recipe) -> list[list[LinearShape]]:
    """The targeted linears of each block. Raises: RecipeError: a target selects nothing."""
    wanted = recipe.adapter.target_modules
    return _selected(shapes, wanted if isinstance(wanted, str) else tuple(wanted))


def adapter_tensors(shapes: ModelShapes, recipe: Recipe) -> Iterator[int]:
    """Parameters of each trained tensor: A [rank, in] and B [out, rank] of every target."""
    for block in targets(shapes, recipe):
        for linear in block:
            yield recipe.adapter.rank * linear.in_features
            yield recipe.adapter.rank * linear.out_features


def trainable_parameters(shapes: ModelShapes, recipe: Recipe) -> int:
    """rank * (in + out), summed over the targets. Source: Hu et al. 2021 (arXiv:2106.09685), section 4.2."""
    return sum(adapter_tensors(shapes, recipe))


def adapter(shapes: ModelShapes, recipe: Recipe) -> int:
    """A and B in `adapter.dtype`."""
    return trainable_parameters(shapes, recipe) * DTYPE_BYTES[recipe.adapter.dtype]


def gradients(shapes: ModelShapes, recipe: Recipe) -> int:
    """Of A and B, in their dtype; accumulated in place, so grad_accumulation costs nothing more."""
    return adapter(shapes, recipe)


def optimizer(shapes: ModelShapes, recipe: Recipe) -> int:
    """Both moments of every trained tensor, by the row of OPTIMIZERS, and the lower halves of master weights.

    Paged state counts as if it lay on the device. The lower halves, 2 bytes a trained parameter, always do.
    """
    row, lower_bytes, dtype_bytes = OPTIMIZERS[recipe.train.optimizer], 0, DTYPE_BYTES[recipe.adapter.dtype]
    if recipe.keeps_master_weights:
        lower_bytes, dtype_bytes = FP32 - dtype_bytes, FP32
    return sum(row.state_bytes(count, dtype_bytes) + lower_bytes * count for count in adapter_tensors(shapes, recipe))


# ------------------------------------------------------------------------------------------------- estimated


def block_inputs(shapes: ModelShapes, recipe: Recipe) -> int:
    """What gradient checkpointing keeps: the input of each block, [tokens, hidden] in `model.dtype`.

    Source: Chen et al. 2016 (arXiv:1604.06174); with bf16 the 2 * layers * hidden bytes a token of published runs.
    """
    return shapes.layers * tokens(recipe) * shapes.hidden * _dtype_bytes(recipe)


def is_masked(recipe: Recipe) -> bool:
    """Whether attention needs an explicit mask: packed documents, or several sequences that may be padded."""
    return recipe.data.packing or recipe.train.micro_batch > 1


def _squares(recipe: Recipe) -> int:
    """Elements of a [micro_batch, seq_len, seq_len] tensor."""
    return recipe.train.micro_batch * recipe.data.seq_len**2


def attention_mask(recipe: Recipe) -> int:
    """The boolean mask [micro_batch, 1, seq_len, seq_len] that all blocks share."""
    return _squares(recipe) if is_masked(recipe) else 0


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


def _score_bytes(shapes: ModelShapes, recipe: Recipe) -> int:
    """What attention keeps that grows with seq_len squared.

    Fused: the mask, turned into `model.dtype` to be added. Otherwise the capped scores of every head in `model.dtype`,
    their softmax in fp32, and that again in `model.dtype`.
    """
    dtype_bytes = _dtype_bytes(recipe)
    if shapes.architecture.eager_attention:
        return _squares(recipe) * shapes.heads * (2 * dtype_bytes + FP32)
    return attention_mask(recipe) * dtype_bytes


def _norm_bytes_per_token(shapes: ModelShapes, recipe: Recipe) -> int:
    """RMS norms keep an fp32 copy of their input and one fp32 number; layer norms the input itself."""
    copies = shapes.architecture.layer_norm_copies
    if copies is not None:
        return copies * shapes.hidden * _dtype_bytes(recipe)
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
    values = inputs + _attention_values(shapes, is_masked(recipe)) + row.mlp_saved * inner + branch
    log_sum_exp = 0 if row.eager_attention else FP32 * shapes.heads
    per_token = values * _dtype_bytes(recipe) + _norm_bytes_per_token(shapes, recipe) + log_sum_exp
    return tokens(recipe) * per_token + _score_bytes(shapes, recipe)


def block_transient(shapes: ModelShapes, recipe: Recipe) -> int:
    """What backward adds to `block_saved` at its highest point in a block: the largest of up to three places.

    The MLP's activation function: gradients of the block's output (hidden), of the MLP's product and of both its
    factors are alive, while the product itself has been released; net, a token, hidden + the outputs of `mlp_in` in
    `model.dtype`, and the MLP's width once more where the function is composed of small steps. With `block_saved`,
    Llama-2-70B has 60.5 * hidden bytes a token, published runs of other stacks 62.6 to 70.6.
    An RMS norm over the MLP's output: the gradient in `model.dtype` and six fp32 tensors of the norm's own backward.
    Attention without a fused kernel: gradients of the softmax's output and input in fp32; the MLP is released by then.
    """
    row, dtype_bytes = shapes.architecture, _dtype_bytes(recipe)
    inner = shapes.linear(row.mlp_out).in_features
    produced = sum(shapes.linear(name).out_features for name in row.mlp_in) + (inner if row.mlp_saved > 3 else 0)
    in_mlp = tokens(recipe) * (shapes.hidden + produced) * dtype_bytes
    in_norm = tokens(recipe) * shapes.hidden * (dtype_bytes + 6 * FP32) if row.output_norm else 0
    released = tokens(recipe) * (shapes.hidden + (row.mlp_saved + 1) * inner) * dtype_bytes
    in_scores = _squares(recipe) * shapes.heads * 2 * FP32 - released if row.eager_attention else 0
    return max(in_mlp, in_norm, in_scores)


def kept_activations(shapes: ModelShapes, recipe: Recipe) -> int:
    """On the device from forward to backward: block inputs (two with activation offload), or all of all blocks."""
    if not recipe.memory.gradient_checkpointing:
        return shapes.layers * block_saved(shapes, recipe) + block_inputs(shapes, recipe) // shapes.layers
    kept = block_inputs(shapes, recipe)
    return min(kept, 2 * kept // shapes.layers) if recipe.memory.activation_offload else kept


def offloaded_activations(shapes: ModelShapes, recipe: Recipe) -> int:
    """Block inputs in host memory."""
    offloads = recipe.memory.activation_offload and recipe.memory.gradient_checkpointing
    return block_inputs(shapes, recipe) if offloads else 0


def logits(shapes: ModelShapes, recipe: Recipe, with_gradient: bool = True) -> int:
    """One tile of logits of `training.loss`: a chunk of tokens by a chunk of the vocabulary, worked on in place.

    An element: `model.dtype` as projected (none of its own when that is fp32) and fp32, 6 bytes with bf16, where
    transformers' loss takes 14 of all logits. Capped logits need the square of their tanh in fp32 too, for the slope.
    """
    dtype_bytes = _dtype_bytes(recipe)
    squares = FP32 if shapes.softcap and with_gradient else 0
    per_element = (dtype_bytes if dtype_bytes < FP32 else 0) + FP32 + squares
    return loss_chunk_tokens(recipe) * min(shapes.vocabulary, LOSS_CHUNK_VOCABULARY) * per_element


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
    return min(SLOTS, -(-shapes.vocabulary // rows)) * rows * shapes.hidden * _dtype_bytes(recipe)


def around_head(shapes: ModelShapes, recipe: Recipe) -> int:
    """What `training.loss` and the final norm hold beside the tile of logits.

    For all tokens the norm's fp32 copy, the last hidden state, and its learned rows, which become their gradient. For
    those that pass the head together (a chunk; all of them where the head is fetched) an fp32 sum and the target's row.
    For a chunk the product that is added to the sum, and its fp32 copy.
    """
    dtype_bytes, chunk = _dtype_bytes(recipe), loss_chunk_tokens(recipe)
    together = tokens(recipe) if fetches_head(recipe) else chunk
    added = FP32 + (dtype_bytes if dtype_bytes < FP32 else 0)
    rows = (tokens(recipe) * (FP32 + 2 * dtype_bytes), together * (FP32 + dtype_bytes), chunk * added)
    return shapes.hidden * sum(rows)


def workspace(shapes: ModelShapes, recipe: Recipe) -> int:
    """The largest linear of a block, dequantized to `model.dtype`, one at a time; nothing when none is quantized."""
    return largest_linear(shapes) * _dtype_bytes(recipe) if _quantized(recipe) else 0


def largest_linear(shapes: ModelShapes) -> int:
    """Weights of the largest linear of a block."""
    return max(linear.weights for linear in shapes.linears)


def largest_tensor(shapes: ModelShapes) -> int:
    """Parameters of the largest tensor of the base."""
    others = (*shapes.outer_tensors, *shapes.block_tensors)
    return max(largest_linear(shapes), *(prod(shape) for _, shape in others))


# --------------------------------------------------------------------------------------------------- ledgers


def static_ledger(shapes: ModelShapes, recipe: Recipe, runtime_bytes: int) -> Ledger:
    """What lies on the device all through training; the moving components are zero."""
    formulas = (base_nf4, quant_constants, base_unquantized, adapter, gradients, optimizer)
    ledger = dict.fromkeys(COMPONENTS, 0) | {formula.__name__: formula(shapes, recipe) for formula in formulas}
    return ledger | {"runtime": runtime_bytes, "workspace": slots(shapes, recipe)}


def training_moments(shapes: ModelShapes, recipe: Recipe, runtime_bytes: int) -> dict[str, Ledger]:
    """The ledger at each moment of a step that can be its peak.

    loss: kept activations, what is held around the head, one tile of logits.
    block backward: kept activations, one block recomputed and its backward; one dequantized linear.
    """
    static = static_ledger(shapes, recipe, runtime_bytes)
    kept = kept_activations(shapes, recipe) + attention_mask(recipe)
    recomputed = block_saved(shapes, recipe) if recipe.memory.gradient_checkpointing else 0
    in_block = recomputed + block_transient(shapes, recipe)
    return {
        "loss": static | {"activations": kept + around_head(shapes, recipe), "logits": logits(shapes, recipe)},
        "block backward": static
        | {"activations": kept + in_block, "workspace": static["workspace"] + workspace(shapes, recipe)},
    }


def evaluation_moments(shapes: ModelShapes, recipe: Recipe, runtime_bytes: int) -> dict[str, Ledger]:
    """The same without gradients: nothing is kept, one block's forward or one tile of logits is alive.

    A block's forward, a token: residual, its norm, the outputs of `mlp_in`, act(gate) and the product.
    """
    static = static_ledger(shapes, recipe, runtime_bytes) | {"gradients": 0}
    row, dtype_bytes = shapes.architecture, _dtype_bytes(recipe)
    produced = sum(shapes.linear(name).out_features for name in row.mlp_in)
    in_block = 2 * shapes.hidden + produced + 2 * shapes.linear(row.mlp_out).in_features
    hidden, mask = tokens(recipe) * shapes.hidden * (FP32 + 2 * dtype_bytes), attention_mask(recipe)
    forward = tokens(recipe) * in_block * dtype_bytes + mask + _score_bytes(shapes, recipe)
    return {
        "loss": static | {"activations": hidden + mask, "logits": logits(shapes, recipe, with_gradient=False)},
        "block forward": static
        | {"activations": forward, "workspace": static["workspace"] + workspace(shapes, recipe)},
    }


def total(ledger: Ledger) -> int:
    """Sum of the components."""
    return sum(ledger.values())
