"""litgpt's block and head: its own model, quantized by Lightning, and never recomputed on one device.

Why: 35 published peaks come from it, and it keeps other things than transformers does. How: bytes a token, read from
litgpt 0.4.0 `lora.py`, `model.py`, `rmsnorm.py`, `utils.py`, Lightning 2.1 `bitsandbytes.py` and bitsandbytes 0.42
`MatMul4Bit`; docs/memory.md derives each. Imports no torch. Imported by planning/stack_moments.
"""

from __future__ import annotations

from qlora_kit.planning.quantities import FP32, is_quantized, selections
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.planning.stack_block import HALF, MASK, attention_values, attention_widths, is_parallel
from qlora_kit.planning.stacks import Stack
from qlora_kit.recipe import Recipe

HEAD_CHUNK = 128  # positions of each sequence whose logits are made, and whose loss is taken, at a time


def _norms(shapes: ModelShapes) -> int:
    rms = shapes.architecture.layer_norm_copies is None
    norms = sum(name.endswith("norm.weight") or name.startswith("ln_") for name, _ in shapes.block_tensors)
    if rms:
        return FP32 * norms * shapes.hidden
    return HALF * (1 if is_parallel(shapes) else 2) * shapes.hidden


def _attention(shapes: ModelShapes, recipe: Recipe) -> int:
    """q, k, v and the output; heads are repeated where there are fewer of keys. v is a view of the fused projection."""
    row = shapes.architecture
    query, key, produced = attention_widths(shapes, False)
    repeated = key < query
    if row.eager_attention:  # the scores' tanh, their softmax in fp32, and that in bf16; the output is not kept
        return HALF * 3 * query + recipe.data.seq_len * shapes.heads * (HALF + FP32 + HALF)
    values = attention_values(shapes, True) if repeated else 2 * query + key + produced
    return HALF * values + FP32 * shapes.heads


def _branches(shapes: ModelShapes, recipe: Recipe) -> int:
    """Masks and dropped inputs; q, k and v share one. If only some of them are trained, `index_copy` keeps B A x."""
    row, rank = shapes.architecture, recipe.adapter.rank
    selected = max(selections(shapes, recipe), key=len)
    trained = [linear for linear in selected if linear.name in row.attention_in]
    per_value = HALF + (MASK if recipe.adapter.dropout else 0)
    total = HALF * rank * len(selected)
    if trained:
        total += per_value * shapes.hidden
        if len(trained) < len(row.attention_in):
            total += HALF * sum(linear.out_features for linear in trained)
    return total + sum(per_value * linear.in_features for linear in selected if linear not in trained)


def litgpt_block_bytes(shapes: ModelShapes, recipe: Recipe) -> int:
    """All that one block keeps for its backward, what 4-bit products keep not counted."""
    row = shapes.architecture
    mlp = HALF * (1 if row.mlp_saved == 1 else 3) * shapes.linear(row.mlp_out).in_features
    return _norms(shapes) + _attention(shapes, recipe) + _branches(shapes, recipe) + mlp


def litgpt_logits(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> float:
    """Bytes a logit at the loss: Fabric makes all of them fp32 (4), log-softmax is kept (4), and one chunk has two
    gradients in fp32. Or, with the logits of the step before still there (4), bf16 (2) and fp32 (4) of this one."""
    chunk = min(HEAD_CHUNK / recipe.data.seq_len, 1)
    in_loss = 2 * FP32 + 2 * FP32 * chunk
    return max(in_loss, 2 * FP32 + HALF) if stack.keeps_graph else in_loss


def litgpt_head(shapes: ModelShapes, recipe: Recipe) -> tuple[int, int]:
    """At one chunk's product with a 4-bit head: bytes a logit, and the head's weight, dequantized to fp16, then bf16.

    fp32 logits (4), of this step in backward or of the one before in forward, and bf16 ones or their gradients (2).
    """
    if not is_quantized(recipe):
        return 0, 0
    return FP32 + HALF, 2 * HALF * shapes.vocabulary * shapes.hidden
