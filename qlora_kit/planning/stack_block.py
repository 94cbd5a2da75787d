"""One block in another stack: what its forward keeps for backward, and what backward adds at its highest point.

Why: with gradient checkpointing one block's backward is what can outgrow the loss; without it all blocks' add up.
How: bytes a token, counted tensor by tensor from the source that the row of STACKS names; docs/memory.md derives each.
transformers' models with peft's adapters are here, litgpt's are in planning/stack_litgpt.
Imports no torch. Imported by planning/stack_moments and planning/stack_litgpt.
"""

from __future__ import annotations

from qlora_kit.architecture_parts import LinearShape
from qlora_kit.planning.block import is_masked
from qlora_kit.planning.quantities import FP32, is_quantized, selections
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.planning.stacks import Stack
from qlora_kit.recipe import Recipe

HALF = 2  # bytes of a bf16 value
MASK = 1  # and of an element of a dropout mask


def is_wide(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> bool:
    """Whether the residual stream is fp32: norms put out fp32, and a 4-bit linear puts out what it is given."""
    from_norms = stack.upcasts != "none" or (stack.autocasts and shapes.architecture.layer_norm_copies is not None)
    return is_quantized(recipe) and from_norms


def value(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> int:
    """Bytes of a value of the residual stream and of linears that read a normed copy of it."""
    return FP32 if is_wide(shapes, recipe, stack) else HALF


def is_parallel(shapes: ModelShapes) -> bool:
    """Whether attention and MLP read the same input."""
    return shapes.architecture.layer_norm_copies == 0


def _norms(shapes: ModelShapes) -> tuple[int, int]:
    """Norms of a block over the hidden width, and values a token that the norms of q and k read."""
    of_stream = of_heads = 0
    for name, _ in shapes.block_tensors:
        role = name.removesuffix(".weight").rpartition(".")[2]
        if role in ("q_norm", "k_norm"):
            of_heads += shapes.linear(f"self_attn.{role[0]}_proj").out_features
        elif role.endswith("norm") or role.startswith("ln_"):
            of_stream += 1
    return of_stream, of_heads


def norm_bytes(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> int:
    """What the norms keep: an fp32 copy each; or, if they are fused or the stream is fp32, their input itself.

    The block's own input is not counted.
    """
    count, of_heads = _norms(shapes)
    if not stack.fused_norms and not is_wide(shapes, recipe, stack):
        return FP32 * (count * shapes.hidden + of_heads)
    first = 1 if shapes.architecture.pre_norm else 0
    if is_parallel(shapes):
        first = count
    return value(shapes, recipe, stack) * ((count - first) * shapes.hidden + of_heads)


def attention_widths(shapes: ModelShapes, repeated: bool) -> tuple[int, int, int]:
    """Values a token of the queries, of the keys as attention takes them, and of all that the projections put out."""
    row = shapes.architecture
    query = shapes.linear(row.attention_out).in_features
    produced = sum(shapes.linear(name).out_features for name in row.attention_in)
    return query, query if repeated else (produced - query) // 2, produced


def attention_values(shapes: ModelShapes, repeated: bool) -> int:
    """Values a token of q, k, v and the output as attention keeps them; a view keeps all of a fused projection."""
    row, (query, key, produced) = shapes.architecture, attention_widths(shapes, repeated)
    if not row.rotary:
        return produced + query
    if len(row.attention_in) > 1 or repeated:
        return 2 * query + 2 * key
    return 2 * query + key + produced


def attention_bytes(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> int:
    """What attention keeps: q, k, v and its output, and in fp32 the log-sum-exp of each head, or all scores."""
    repeated = shapes.model_type in stack.repeats_heads
    repeated |= stack.masks and (is_masked(shapes, recipe, masks_padding=True) or shapes.architecture.eager_attention)
    scores = recipe.data.seq_len * (FP32 + HALF) if stack.eager else FP32
    return HALF * attention_values(shapes, repeated) + scores * shapes.heads


def _selected(shapes: ModelShapes, recipe: Recipe) -> list[LinearShape]:
    """The targeted linears of the block that has the widest of them."""
    return max(selections(shapes, recipe), key=lambda block: sum(linear.in_features for linear in block))


def _fused_parts(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> set[str]:
    """The linears that are one function with their adapters: of attention, and of an MLP that is targeted whole."""
    row, selected = shapes.architecture, {linear.name for linear in _selected(shapes, recipe)}
    if not (stack.fused_branches and is_quantized(recipe)):
        return set()
    mlp = {*row.mlp_in, row.mlp_out}
    return {*row.attention_linears} | (mlp if mlp <= selected and len(row.mlp_in) == 2 else set())


def branch_bytes(shapes: ModelShapes, recipe: Recipe, stack: Stack, *, of_mlp_out: bool) -> int:
    """What the adapters keep of a block's linears: of `mlp_out`, or of all others.

    Of each target a mask and the dropped input in bf16; without dropout an input that is bf16 already is shared. And
    x A. Fused functions keep no mask and make x A again, but keep the input of q, k and v, and of gate and up, too.
    """
    row, dropped = shapes.architecture, recipe.adapter.dropout > 0
    fused = _fused_parts(shapes, recipe, stack)
    cast = is_wide(shapes, recipe, stack) or (stack.autocasts and not is_quantized(recipe))
    total, shared = 0, {}
    for linear in _selected(shapes, recipe):
        if (linear.name == row.mlp_out) != of_mlp_out:
            continue
        in_fused = linear.name in fused
        own_copy = dropped or (cast and not in_fused)
        if own_copy:
            total += HALF * linear.in_features
        if not own_copy or (in_fused and linear.name not in (row.attention_out, row.mlp_out)):
            shared[_input_of(shapes, linear)] = HALF * linear.in_features
        if not in_fused:
            total += (MASK if dropped else 0) * linear.in_features + HALF * recipe.adapter.rank
    return total + sum(shared.values())


def _input_of(shapes: ModelShapes, linear: LinearShape) -> str:
    """What a linear reads; linears that read the same keep it once."""
    row = shapes.architecture
    return "attention" if linear.name in row.attention_in else "mlp" if linear.name in row.mlp_in else linear.name


def _writes_in_place(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> bool:
    """Whether gate and up are kept, act(gate) is not, and their gradients take their place."""
    row = shapes.architecture
    return len(row.mlp_in) == 2 and (stack.fused_swiglu or row.mlp_out in _fused_parts(shapes, recipe, stack))


def mlp_bytes(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> int:
    """What an MLP keeps between its linears; of a token's experts each, and their outputs, which are weighted."""
    row, (_, used) = shapes.architecture, shapes.experts
    kept = row.mlp_saved - (1 if _writes_in_place(shapes, recipe, stack) else 0)
    values = used * kept * shapes.linear(row.mlp_out).in_features + (used * shapes.hidden if used > 1 else 0)
    return value(shapes, recipe, stack) * values


def mlp_backward_bytes(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> int:
    """What backward adds at an MLP's activation function: the gradient of its output, and of what went in.

    Of experts, those of the tokens of one of them, evenly routed, and the gradients around their weights.
    """
    row, (experts, used) = shapes.architecture, shapes.experts
    inner = shapes.linear(row.mlp_out).in_features
    gradients = 1 if _writes_in_place(shapes, recipe, stack) else 2 if row.mlp_saved == 1 else 3
    values = gradients * inner + (2 * shapes.hidden if experts > 1 else 0)
    return value(shapes, recipe, stack) * values * used // experts


def block_bytes(shapes: ModelShapes, recipe: Recipe, stack: Stack, *, at_mlp: bool = False) -> int:
    """All that one block keeps for its backward, its own input not counted.

    Args:
        at_mlp: when backward has passed `mlp_out`, whose adapter has let go of what it kept.
    """
    parts = norm_bytes, attention_bytes, mlp_bytes
    total = sum(part(shapes, recipe, stack) for part in parts)
    total += branch_bytes(shapes, recipe, stack, of_mlp_out=False)
    return total + (0 if at_mlp else branch_bytes(shapes, recipe, stack, of_mlp_out=True))


def kept_inputs(shapes: ModelShapes, recipe: Recipe, stack: Stack) -> int:
    """Inputs that 4-bit products of all blocks keep, where they do: of q, k and v, of the projection after attention,
    of the MLP (the same as of q, k and v where there is one norm) and of its last linear; and of litgpt's 4-bit head.
    """
    if not (stack.keeps_inputs and is_quantized(recipe)):
        return 0
    row = shapes.architecture
    hidden = min(_norms(shapes)[0], 2) * shapes.hidden
    widths = hidden + shapes.linear(row.attention_out).in_features + shapes.linear(row.mlp_out).in_features
    return HALF * (shapes.layers * widths + (shapes.hidden if stack.litgpt else 0))
