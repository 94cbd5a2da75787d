"""The ledger of a recipe in another stack: what is static, and what a step adds at each moment that can be its peak.

Why: the same ten components and the same maximum over moments as for this kit, so that the two can be compared.
How: static bytes by the kit's own formulas with the stack's dtypes; moments from planning/stack_block or
planning/stack_litgpt. docs/memory.md derives each term. Imports no torch. Imported by planning/stack_plan and tools.
"""

from __future__ import annotations

from math import prod

from qlora_kit.optimizers import OPTIMIZERS
from qlora_kit.planning import components
from qlora_kit.planning.block import score_bytes
from qlora_kit.planning.components import COMPONENTS, Ledger
from qlora_kit.planning.decide import with_memory
from qlora_kit.planning.moments import total
from qlora_kit.planning.quantities import FP32, is_quantized, recomputed_blocks, tokens
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.planning.stack_block import HALF, block_bytes, is_wide, kept_inputs, mlp_backward_bytes, value
from qlora_kit.planning.stack_litgpt import litgpt_block_bytes, litgpt_head, litgpt_logits
from qlora_kit.planning.stacks import Stack
from qlora_kit.recipe import Recipe

BATCH_BYTES = 24  # a token of a batch on the device: ids, labels and mask, int64 each
# What torch's allocator hands to cuBLAS on an A100 (`CUBLAS_WORKSPACE_CONFIG` :4096:2:16:8), once for the thread that
# runs forward and once for autograd's (aten/src/ATen/cuda/CublasHandlePool.cpp).
CUBLAS_BYTES = 2 * (2 * 4096 + 8 * 16) * 1024


def in_stack(recipe: Recipe, stack: Stack) -> Recipe:
    """The recipe as another stack can run it: all on the device, all logits, all blocks recomputed or none."""
    recomputes = stack.recomputes and recipe.memory.gradient_checkpointing not in (False, 0)
    return with_memory(
        recipe,
        placement="device",
        resident_blocks=0,
        host_blocks=0,
        embeddings="device",
        gradient_checkpointing=recomputes,
        activation_offload=False,
        keep_dequantized=False,
        mlp_tile_tokens="full",
        micro_batches_together=1,
        loss_chunk_tokens="full",
    )


# ------------------------------------------------------------------------------------------------------------ static


def _head_parameters(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> tuple[int, int]:
    """Parameters of a head that is quantized too, and of one that the stack keeps although it is tied."""
    size = shapes.vocabulary * shapes.hidden
    if not stack.litgpt:
        return 0, 0
    return (size, 0) if is_quantized(recipe) else (0, size if shapes.tied else 0)


def _unquantized(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> int:
    """Embedding, head, norms and biases, bf16 but for what `upcasts` names; the linears where nothing is quantized."""
    quantized_head, own_head = _head_parameters(shapes, recipe, stack)
    removed = quantized_head if quantized_head and not shapes.tied else 0
    others = shapes.other_parameters + own_head - removed
    if not is_quantized(recipe):
        return HALF * (others + shapes.layers * shapes.block_linear_parameters)
    if stack.upcasts == "all":
        return FP32 * others
    norms = sum(prod(shape) for name, shape in shapes.tensors if "norm" in name or "ln_" in name)
    return HALF * others + (HALF * norms if stack.upcasts == "norms" else 0)


def _adapter_parameters(shapes: ModelShapes, recipe: Recipe) -> int:
    return components.trainable_parameters(shapes, recipe)


def _optimizer(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> int:
    row = OPTIMIZERS[recipe.train.optimizer]
    if row.unpaged is not None and not stack.counts_paged:
        return 0
    tensors = components.adapter_tensors(shapes, recipe).items()
    return sum(count * row.state_bytes(size, stack.adapter_bytes) for size, count in tensors)


def static_ledger(shapes: ModelShapes, recipe: Recipe, stack: Stack, runtime_bytes: int) -> Ledger:
    """What lies on the device between two steps, the batch included; the moving components are zero.

    Args:
        recipe: as `in_stack` made it.
        runtime_bytes: of the device; or CUBLAS_BYTES, where only torch's allocator is asked.
    """
    codes, scales = components.base_nf4(shapes, recipe), components.quant_constants(shapes, recipe)
    head = _head_parameters(shapes, recipe, stack)[0]
    if head:
        codes, scales = (
            codes + head // 2,
            scales + head // components.QUANT_BLOCK * (1 if recipe.model.double_quant else FP32),
        )
    return dict.fromkeys(COMPONENTS, 0) | {
        "base_nf4": codes,
        "quant_constants": scales,
        "base_unquantized": _unquantized(shapes, recipe, stack),
        "adapter": stack.adapter_bytes * _adapter_parameters(shapes, recipe),
        "optimizer": _optimizer(shapes, recipe, stack),
        "activations": BATCH_BYTES * tokens(recipe),
        "runtime": runtime_bytes,
    }


# ----------------------------------------------------------------------------------------------------------- moments


def stack_moments(shapes: ModelShapes, recipe: Recipe, stack: Stack, runtime_bytes: int) -> dict[str, Ledger]:
    """The ledger at each moment of a step that can be its peak.

    Gradients of all adapters are there from the second micro-batch of a step on.
    """
    static = static_ledger(shapes, recipe, stack, runtime_bytes)
    gradients = stack.adapter_bytes * _adapter_parameters(shapes, recipe)
    if recipe.train.grad_accumulation > 1:
        static["gradients"] = gradients
    added = (_litgpt if stack.litgpt else _transformers)(shapes, recipe, stack)
    moments = {
        name: static
        | {
            "activations": static["activations"] + activations,
            "logits": logits,
            "workspace": workspace,
        }
        for name, (activations, logits, workspace) in added.items()
    }
    return moments | {"optimizer step": static | {"gradients": gradients}}


Added = dict[str, tuple[int, int, int]]  # a moment's activations, logits, and dequantized weights


def _inputs(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> int:
    """Bytes a token of all blocks' inputs; the first comes from the embedding, which may be bf16 still."""
    one = shapes.hidden * value(shapes, recipe, stack)
    first = one if stack.upcasts == "all" else HALF * shapes.hidden
    return first + (0 if stack.offloads_inputs else (shapes.layers - 1) * one)


def _kept(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> int:
    """Bytes a token that forward leaves: the inputs of blocks if they are recomputed; otherwise all that they keep, and
    their inputs where norms keep these. gpt_bigcode leaves `use_cache` on, and keys and values are views of all that
    `c_attn` puts out.
    """
    total = kept_inputs(shapes, recipe, stack)
    if not recomputed_blocks(shapes, recipe):
        norms_read = stack.fused_norms or is_wide(shapes, recipe, stack)
        total += _inputs(shapes, recipe, stack) if norms_read else 0
        return total + shapes.layers * block_bytes(shapes, recipe, stack)
    if shapes.model_type == "gpt_bigcode":
        total += shapes.layers * shapes.linear("attn.c_attn").out_features * value(shapes, recipe, stack)
    return total + _inputs(shapes, recipe, stack)


def _around_loss(shapes: ModelShapes, recipe: Recipe, stack: Stack, kept: int) -> Added:
    """The loss and its backward. Capped logits leave their tanh, in bf16, where no kernel makes it again."""
    count, one = tokens(recipe), shapes.hidden * value(shapes, recipe, stack)
    final_norm = one if stack.fused_norms else FP32 * shapes.hidden
    output = FP32 * shapes.hidden if _normed_to_fp32(shapes, recipe, stack) else one
    if stack.fused_head is not None:
        logits = stack.fused_head * _head_chunk(shapes, count) * shapes.vocabulary
        return {"loss": (count * (kept + final_norm + 2 * output), logits, 0)}
    capped = HALF if shapes.softcap and not stack.fused_branches else 0
    forward = stack.bigcode_loss if shapes.model_type == "gpt_bigcode" else stack.loss_forward
    logits = count * shapes.vocabulary
    return {
        "loss": (count * (kept + final_norm + output), (forward + capped) * logits, 0),
        "loss backward": (count * (kept + final_norm), (stack.loss_backward + capped) * logits, 0),
    }


def _transformers(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> Added:
    """The loss; the backward of the last block, and where sequences are short the first product of that backward."""
    count, one = tokens(recipe), value(shapes, recipe, stack)
    kept = _kept(shapes, recipe, stack)
    there = kept + one * shapes.hidden  # the gradient of the block's output
    if recomputed_blocks(shapes, recipe):
        output = one * shapes.hidden if stack.keeps_output else 0
        there += block_bytes(shapes, recipe, stack, at_mlp=True) + output
    experts, used = shapes.experts
    product = one * shapes.linear(shapes.architecture.mlp_out).in_features * used // experts
    weight = HALF * components.largest_linear(shapes) if is_quantized(recipe) else 0
    scores = _scores(shapes, recipe, stack)
    return _around_loss(shapes, recipe, stack, kept) | {
        "block backward": (count * (there + mlp_backward_bytes(shapes, recipe, stack)) + scores, 0, 0),
        "block product": (count * (there + product) + scores, 0, weight),
    }


def _normed_to_fp32(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> bool:
    """Whether the final norm puts out fp32: its weight is, or it is a layer norm under autocast."""
    return is_wide(shapes, recipe, stack) or (stack.autocasts and shapes.architecture.layer_norm_copies is not None)


def _scores(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> int:
    """What attention keeps of one block that grows with seq_len squared: a mask, or scores where it is not fused."""
    if stack.masks or shapes.architecture.eager_attention:
        return score_bytes(shapes, recipe, masks_padding=True)
    return 0


def _head_chunk(shapes: ModelShapes, count: int) -> int:
    """Tokens whose logits exist at a time in the fused head: ceil(tokens / ceil(V / h)), up to a power of two.

    Source: liger-kernel `fused_linear_cross_entropy_forward`.
    """
    wanted = -(-count // -(-shapes.vocabulary // shapes.hidden))
    return min(count, 1 << (wanted - 1).bit_length())


def _litgpt(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> Added:
    """The loss; and one chunk of a 4-bit head. With `keeps_graph` inputs of 4-bit products are there twice."""
    rms = shapes.architecture.layer_norm_copies is None
    final_norm = (FP32 if rms else HALF) * shapes.hidden + HALF * shapes.hidden
    inputs = kept_inputs(shapes, recipe, stack) * (2 if stack.keeps_graph else 1)
    kept = shapes.layers * litgpt_block_bytes(shapes, recipe) + final_norm + inputs
    count, (at_head, weight) = tokens(recipe), litgpt_head(shapes, recipe)
    activations, logits = count * kept, count * shapes.vocabulary
    return {
        "loss": (activations, int(logits * litgpt_logits(shapes, recipe, stack)), 0),
        "head": (activations, logits * at_head, weight),
    }


def stack_peak(shapes: ModelShapes, recipe: Recipe, stack: Stack, runtime_bytes: int) -> tuple[str, Ledger]:
    """The highest moment of a training step, and what is on the device then; `recipe` as `in_stack` made it."""
    moments = stack_moments(shapes, recipe, stack, runtime_bytes)
    name = max(moments, key=lambda moment: total(moments[moment]))
    return name, moments[name]
