"""One block and one micro-batch: what its forward keeps for backward, what running it again and backward take.

Why: when blocks are recomputed, the highest point of one block's backward is what is left of activation memory. How:
counted tensor by tensor from what autograd saves and what its kernels allocate, in the docstrings; a test holds the
counts, for every architecture, to a step of the real code on the simulated accelerator. Widths are values a token.
Imports no torch. Imported by planning/activations and planning/moments.
"""

from __future__ import annotations

from qlora_kit.planning.quantities import DTYPE_BYTES, FP32, hidden_state, selections, tokens, value_bytes
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.recipe import Recipe


def is_masked(shapes: ModelShapes, recipe: Recipe, masks_padding: bool = False) -> bool:
    """Whether fused attention needs a mask: packed documents, or a window that is shorter than the sequence.

    Args:
        masks_padding: where several sequences are padded, too; this kit pads to the right and needs none.
    """
    windowed = shapes.window is not None and recipe.data.seq_len > shapes.window
    return recipe.data.packing or windowed or (masks_padding and recipe.train.micro_batch > 1)


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


def tile_tokens(recipe: Recipe) -> int:
    """Tokens of one tile of an MLP or a norm (`training.tiles`)."""
    return recipe.train.micro_batch * min(recipe.memory.tile_tokens or recipe.data.seq_len, recipe.data.seq_len)


def is_tiled(shapes: ModelShapes, recipe: Recipe) -> bool:
    """Whether the MLP runs in several tiles; one whose output is normed does not."""
    return tile_tokens(recipe) < tokens(recipe) and not shapes.architecture.output_norm


def _heads(shapes: ModelShapes, recipe: Recipe) -> tuple[int, int]:
    """Widths of the queries, and of the keys as attention takes them; the values' is the same.

    With a mask, or without a fused kernel, key and value heads are repeated to the number of query heads first
    (transformers' `repeat_kv`); a single one is repeated as a view.
    """
    row = shapes.architecture
    query = shapes.linear(row.attention_out).in_features
    key = (sum(shapes.linear(name).out_features for name in row.attention_in) - query) // 2
    repeated = is_masked(shapes, recipe) or row.eager_attention
    return query, query if repeated and key > query // shapes.heads else key


def _attention_values(shapes: ModelShapes, recipe: Recipe) -> int:
    """Values a token of q, k, v as attention keeps them for its backward.

    Of a fused projection v is a view, which keeps all of it alive, unless it is repeated; and attention's output is
    kept twice, before and after its heads are put side by side, as it is where heads are normed first.
    """
    row = shapes.architecture
    query, key = _heads(shapes, recipe)
    produced = sum(shapes.linear(name).out_features for name in row.attention_in)
    if not row.rotary:
        return produced
    if len(row.attention_in) > 1:
        return query + 2 * key + (query if row.heads_first else 0)
    return 2 * query + key + (key if key > (produced - query) // 2 else produced)


def score_bytes(shapes: ModelShapes, recipe: Recipe, masks_padding: bool = False) -> int:
    """What attention keeps that grows with seq_len squared.

    Fused: the mask, turned into `model.dtype` to be added. Otherwise the capped scores of every head in `model.dtype`,
    their softmax in fp32, and that again in `model.dtype`.
    """
    if shapes.architecture.eager_attention:
        return _squares(recipe) * shapes.heads * (2 * value_bytes(recipe) + FP32)
    return _squares(recipe) * value_bytes(recipe) if is_masked(shapes, recipe, masks_padding) else 0


def _norm_inputs(shapes: ModelShapes, of_heads: bool) -> int:
    """Values a token that norms keep: their inputs, but for the block's own, which is kept anyway.

    Args:
        of_heads: those of q and k; otherwise those of the width of the residual stream.
    """
    row = shapes.architecture
    if row.layer_norm_copies is not None:
        return 0 if of_heads else row.layer_norm_copies * shapes.hidden
    widths = {True: 0, False: -shapes.hidden if row.pre_norm else 0}
    for name, _ in shapes.block_tensors:
        role = name.removesuffix(".weight").rpartition(".")[2]
        if role in ("q_norm", "k_norm"):
            widths[True] += shapes.linear(f"self_attn.{role[0]}_proj").out_features
        elif role.endswith("norm"):
            widths[False] += shapes.hidden
    return widths[of_heads]


def _has_branch(shapes: ModelShapes, recipe: Recipe, *names: str) -> bool:
    """Whether one of these linears is targeted in some block: without a branch a linear keeps no input."""
    return any(linear.name in names for block in selections(shapes, recipe) for linear in block)


def attention_saved(shapes: ModelShapes, recipe: Recipe) -> int:
    """Bytes that autograd keeps of a block's attention: the input of q, k, v (a normed copy of the block's own), q, k
    and v, norms' inputs, the output, x A of each target (rank), in fp32 the log-sum-exp of each head; mask or scores.
    """
    row = shapes.architecture
    values = shapes.linear(row.attention_out).in_features + _norm_inputs(shapes, True)
    if row.pre_norm and _has_branch(shapes, recipe, *row.attention_in):
        values += shapes.hidden
    values += _attention_values(shapes, recipe) + _branch_values(shapes, recipe, mlp=False)
    log_sum_exp = 0 if row.eager_attention else FP32 * shapes.heads
    return tokens(recipe) * (values * value_bytes(recipe) + log_sum_exp) + score_bytes(shapes, recipe)


def _branch_values(shapes: ModelShapes, recipe: Recipe, *, mlp: bool) -> int:
    names = {*shapes.architecture.mlp_in, shapes.architecture.mlp_out}
    most = max(sum((linear.name in names) == mlp for linear in block) for block in selections(shapes, recipe))
    return recipe.adapter.rank * most


def _mlp_values(shapes: ModelShapes, recipe: Recipe) -> int:
    """Values a token that autograd keeps inside an MLP: `mlp_saved` tensors of its width, their product, and x A.

    Of experts, as many as a token passes, and their outputs, which are weighted.
    """
    row, (experts, used) = shapes.architecture, shapes.experts
    inner = shapes.linear(row.mlp_out).in_features
    outputs = shapes.hidden if experts > 1 else 0
    kept = row.mlp_saved + _has_branch(shapes, recipe, row.mlp_out)
    return used * (kept * inner + _branch_values(shapes, recipe, mlp=True) + outputs)


def _around_mlp(shapes: ModelShapes, recipe: Recipe) -> int:
    """Bytes of the MLP's input and of the inputs of the norms around it."""
    keeps_input = is_tiled(shapes, recipe) or _has_branch(shapes, recipe, *shapes.architecture.mlp_in)
    return tokens(recipe) * (keeps_input * shapes.hidden + _norm_inputs(shapes, False)) * value_bytes(recipe)


def block_saved(shapes: ModelShapes, recipe: Recipe) -> int:
    """Bytes that autograd keeps of one block between its forward and its backward, its own input not counted.

    Of an MLP in several tiles, their outputs too.
    """
    values = _mlp_values(shapes, recipe) + (shapes.hidden if is_tiled(shapes, recipe) else 0)
    in_mlp = tokens(recipe) * values * value_bytes(recipe)
    return attention_saved(shapes, recipe) + _around_mlp(shapes, recipe) + in_mlp


def kept_passage(shapes: ModelShapes, recipe: Recipe) -> int:
    """What backward adds to what a kept block has saved: at its MLP, or at the norm of the queries."""
    return max(_mlp_gradients(shapes, recipe), _in_head_norms(shapes, recipe) - block_saved(shapes, recipe))


def recomputed_passage(shapes: ModelShapes, recipe: Recipe) -> int:
    """Bytes of one block that is run again and then backward, at its highest point, its output included.

    At the MLP, of which there is one tile; or where tiles are small, at attention; or where there is one tile, at the
    norm of the queries.
    """
    in_tile = tile_tokens(recipe) if is_tiled(shapes, recipe) else tokens(recipe)
    in_mlp = in_tile * _mlp_values(shapes, recipe) * value_bytes(recipe) + _mlp_gradients(shapes, recipe)
    at_mlp = _around_mlp(shapes, recipe) + in_mlp
    later = attention_saved(shapes, recipe) + max(at_mlp, _attention_gradients(shapes, recipe))
    return max(later, _in_head_norms(shapes, recipe)) + hidden_state(shapes, recipe)


def _mlp_gradients(shapes: ModelShapes, recipe: Recipe) -> int:
    """What backward adds at the highest point of an MLP: the larger of two places.

    The gradient of the output is not counted: it is there for as long as the block's backward runs.
    The activation function: gradients of the MLP's product and of both its factors are alive, while the product itself
    has been released, if it was kept; net, a token, the outputs of `mlp_in` in `model.dtype`, and the MLP's width once
    more where it was not, or where the function is composed of small steps. With several tiles, the gradient of the
    whole input, that of the tile before, and the sums of the trained matrices in fp32 beside those of the tile before.
    An RMS norm over the MLP's output.
    """
    row, in_tile = shapes.architecture, tile_tokens(recipe) * value_bytes(recipe)
    inner = shapes.linear(row.mlp_out).in_features
    more = (row.mlp_saved > 3) + (not _has_branch(shapes, recipe, row.mlp_out))
    produced = sum(shapes.linear(name).out_features for name in row.mlp_in) + more * inner
    if is_tiled(shapes, recipe):
        names = {*row.mlp_in, row.mlp_out}
        trained = max(
            sum(linear.in_features + linear.out_features for linear in block if linear.name in names)
            for block in selections(shapes, recipe)
        )
        sums = recipe.adapter.rank * trained * (FP32 + DTYPE_BYTES[recipe.adapter.dtype])
        return hidden_state(shapes, recipe) + in_tile * (produced + shapes.hidden) + sums
    in_norm = _norm_backward(recipe, shapes.hidden, tile_tokens(recipe)) if row.output_norm else 0
    return max(tokens(recipe) * produced * value_bytes(recipe), in_norm)


def _norm_backward(recipe: Recipe, width: int, in_tile: int) -> int:
    """What the backward of an RMS norm adds: the gradient of its input, and of a tile its output and six fp32 tensors.

    With several tiles, the gradient of the tile before.
    """
    narrow = 2 if in_tile < tokens(recipe) else 1
    return width * (tokens(recipe) * value_bytes(recipe) + in_tile * (6 * FP32 + narrow * value_bytes(recipe)))


def _in_head_norms(shapes: ModelShapes, recipe: Recipe) -> int:
    """Bytes of one block at the backward of the norm of its queries: what attention kept for itself is released.

    The input of q, k and v, the norms' inputs, gradients of the residual stream, of q, k and v.
    """
    kept = _norm_inputs(shapes, True)
    if kept == 0 or shapes.architecture.layer_norm_copies is not None:
        return 0
    query = shapes.linear(shapes.architecture.attention_out).in_features
    produced = sum(shapes.linear(name).out_features for name in shapes.architecture.attention_in)
    values = (shapes.architecture.pre_norm + 1) * shapes.hidden + kept + produced
    in_tile = tokens(recipe) if shapes.architecture.heads_first else tile_tokens(recipe)
    return tokens(recipe) * values * value_bytes(recipe) + _norm_backward(recipe, query, in_tile)


def _attention_gradients(shapes: ModelShapes, recipe: Recipe) -> int:
    """What backward adds at the highest point of attention, when all around the MLP is released.

    Gradients of the residual stream, of attention's output, and of q, k and v. Without a fused kernel
    the gradients of the softmax's output and input in fp32, while its output in `model.dtype` is released.
    """
    query, key = _heads(shapes, recipe)
    stream = tokens(recipe) * (shapes.hidden + query) * value_bytes(recipe)
    if shapes.architecture.eager_attention:
        return stream + _squares(recipe) * shapes.heads * (2 * FP32 - value_bytes(recipe))
    return stream + tokens(recipe) * (query + 2 * key) * value_bytes(recipe)


def in_forward(shapes: ModelShapes, recipe: Recipe) -> int:
    """The highest point of one block's forward without gradients, its input and output not counted.

    A normed copy of the stream; and for attention q, k and v, while the queries are rotated three more of them, or with
    a mask k and v once more, and the mask in `model.dtype` and inverted; or for a tile of the MLP the outputs of
    `mlp_in` and the product.
    """
    row, (query, key) = shapes.architecture, _heads(shapes, recipe)
    produced = sum(shapes.linear(name).out_features for name in row.attention_in)
    inner = shapes.linear(row.mlp_out).in_features * (3 if row.mlp_saved > 3 else 1)
    inner += sum(shapes.linear(name).out_features for name in row.mlp_in)
    rotating = tokens(recipe) * (produced + 3 * query) * value_bytes(recipe)
    scores = score_bytes(shapes, recipe)
    attending = (
        tokens(recipe) * (produced + 2 * key) * value_bytes(recipe) + scores + (_squares(recipe) if scores else 0)
    )
    whole = hidden_state(shapes, recipe)
    if not is_tiled(shapes, recipe):
        return whole + max(rotating, attending, tokens(recipe) * inner * value_bytes(recipe))
    return whole + max(rotating, attending, whole + tile_tokens(recipe) * inner * value_bytes(recipe))
