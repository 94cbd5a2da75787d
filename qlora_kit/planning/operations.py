"""What a training step has to compute: its matrix products by shape and part, and the weights that it dequantizes.

Why: times are estimated from this count (planning/timing), and measured ones are held to it (tools/floor), so it
stands in one place. How: counted by shape for one micro-batch of full rows; blocks that are alike are counted once.
Nothing else is counted: no norm, no activation function, no softmax, no optimizer.
Imports no torch. Imported by planning/timing and tools/floor.

Shapes: N tokens of a micro-batch, I in and O out of a linear, R rank, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from qlora_kit.architecture_parts import LinearShape
from qlora_kit.planning.components import loss_chunk_tokens
from qlora_kit.planning.quantities import is_quantized, recomputed_blocks, targets, together, tokens
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.planning.trained import trained_branches, trained_sizes
from qlora_kit.recipe import Recipe

CAUSAL = 0.5  # of the scores, and so of attention's products, lie below the diagonal


@dataclass(frozen=True)
class Product:
    """One matrix product, [m, k] x [k, n], `batch` times; T in `form` means that operand lies transposed in memory."""

    form: Literal["NT", "NN", "TN"]
    m: int
    k: int
    n: int
    batch: int = 1

    @property
    def operations(self) -> int:
        return 2 * self.m * self.k * self.n * self.batch

    @property
    def values(self) -> int:
        """Of both operands and the result."""
        return (self.m * self.k + self.k * self.n + self.m * self.n) * self.batch


Products = defaultdict[Product, float]  # how often each; the part of one that is needed is a fraction
PARTS = ("forward", "recomputation", "backward", "adapter", "attention", "head")


def _runs(shapes: ModelShapes, recipe: Recipe) -> Iterator[tuple[int, bool, bool, list[LinearShape]]]:
    """Blocks one after the other that are alike: how many, whether the first, whether recomputed, their targets."""
    again = recomputed_blocks(shapes, recipe)

    def kind(block: tuple[int, list[LinearShape]]) -> tuple[bool, bool, list[LinearShape]]:
        return block[0] == 0, block[0] < again, block[1]

    for (first, recomputed, selected), blocks in groupby(enumerate(targets(shapes, recipe)), key=kind):
        yield len(list(blocks)), first, recomputed, selected


def count_products(shapes: ModelShapes, recipe: Recipe) -> dict[str, Products]:
    """The products of one micro-batch of full rows, each its own document, by part of the step.

    Block 0's attention inputs need no gradient of x, unless the embedding is trained. The product of the MLP's last
    linear is not needed again in recomputation, only its input (and x A, for B's gradient). An expert has its share.
    """
    row, count, (experts, used) = shapes.architecture, tokens(recipe), shapes.experts
    learns_embedding = bool(trained_sizes(shapes, recipe.adapter, row.embedding))
    work: dict[str, Products] = {part: defaultdict(float) for part in PARTS}
    for blocks, first, recomputed, selected in _runs(shapes, recipe):
        for linear in shapes.linears:
            outputs, inputs = linear.out_features, linear.in_features
            often = blocks * (used / experts if ".experts." in linear.name else 1)
            whole = recomputed and linear.name != row.mlp_out
            needs_x = not first or linear.name not in row.attention_in or learns_embedding
            work["forward"][Product("NT", count, inputs, outputs)] += often
            work["recomputation"][Product("NT", count, inputs, outputs)] += often * whole
            work["backward"][Product("NN", count, outputs, inputs)] += often * needs_x
            if linear in selected:
                sizes = (count, inputs, outputs, recipe.adapter.rank)
                _add_branch(work["adapter"], often, sizes, recomputed + whole, needs_x)
    _add_attention(work["attention"], shapes, recipe)
    chunk, vocabulary = loss_chunk_tokens(recipe), shapes.vocabulary
    chunks = recipe.train.micro_batch * (recipe.data.seq_len - 1) / chunk  # of the learned positions
    work["head"][Product("NT", chunk, shapes.hidden, vocabulary)] += chunks
    work["head"][Product("NN", chunk, vocabulary, shapes.hidden)] += chunks
    if trained_sizes(shapes, recipe.adapter, row.head):  # logits once more, and the gradient of W or of B
        columns = recipe.adapter.rank if row.head in trained_branches(shapes, recipe.adapter.target_modules) else None
        work["head"][Product("NT", chunk, shapes.hidden, vocabulary)] += chunks
        work["head"][Product("TN", vocabulary, chunk, columns or shapes.hidden)] += chunks
    return work


def _add_branch(work: Products, blocks: float, sizes: tuple[int, int, int, int], again: int, needs_x: bool) -> None:
    """x A^T and its B, recomputed (`again` 2) or only x A^T (1); gradients of B and A, and through B and A."""
    count, inputs, outputs, rank = sizes
    work[Product("NT", count, inputs, rank)] += blocks * (1 + (again > 0))
    work[Product("NT", count, rank, outputs)] += blocks * (1 + (again > 1))
    work[Product("NN", count, outputs, rank)] += blocks
    work[Product("TN", rank, count, inputs)] += blocks
    work[Product("TN", outputs, count, rank)] += blocks
    work[Product("NN", count, rank, inputs)] += blocks * needs_x


def _add_attention(work: Products, shapes: ModelShapes, recipe: Recipe) -> None:
    """Q K^T and P V, forward and again; in backward the gradients of P, V, Q and K. Windows are not considered."""
    length, layers, again = recipe.data.seq_len, shapes.layers, recomputed_blocks(shapes, recipe)
    width = shapes.linear(shapes.architecture.attention_out).in_features // shapes.heads
    batch = shapes.heads * recipe.train.micro_batch
    work[Product("NT", length, width, length, batch)] += CAUSAL * (2 * layers + again)
    work[Product("NN", length, length, width, batch)] += CAUSAL * (2 * layers + again)
    work[Product("TN", length, length, width, batch)] += CAUSAL * 2 * layers


def dequantizations(shapes: ModelShapes, recipe: Recipe) -> Counter[tuple[int, int]]:
    """How often a linear of each [O, I] is dequantized in an optimizer step.

    Forward and backward need each weight once, recomputation once more, unless it is kept from there to its use in
    backward (`memory.keep_dequantized`; `auto` counts as true); micro-batches that run together share it.
    """
    needed: Counter[tuple[int, int]] = Counter()
    if not is_quantized(recipe):
        return needed
    again, runs = recomputed_blocks(shapes, recipe), -(-recipe.train.grad_accumulation // together(recipe))
    kept = again > 0 and recipe.memory.keep_dequantized is not False
    for linear in shapes.linears:
        uses = 2 * shapes.layers
        if not kept:
            uses += again if linear.name != shapes.architecture.mlp_out else 0
            uses -= linear.name in shapes.architecture.attention_in  # block 0's: no gradient of x
        needed[linear.out_features, linear.in_features] += runs * uses
    return needed
