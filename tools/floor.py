"""The least time that a training step can take on this machine: its matrix products and its dequantizations.

Why: a step's seconds say nothing by themselves; beside its floor they say how much is overhead. How: the products that
QLoRA with recomputation needs are counted by shape, then each distinct shape is timed on this machine, in this run, the
best of several; so is dequantizing each linear into a buffer that is reused. Nothing else is counted: no norm, no
activation function, no softmax, no optimizer, no reading.
Imported by: bench_roofline, prove_fit.

Shapes: N tokens of a micro-batch, I in and O out of a linear, R rank, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from qlora_kit.base import nf4
from qlora_kit.planning.components import loss_chunk_tokens
from qlora_kit.planning.quantities import targets, tokens
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.recipe import Recipe

REPEATS, REPEAT_SECONDS = 3, 0.2  # each product is run at least so often, and until so much time went by
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


Products = defaultdict[Product, float]  # how often each; the part of one that is needed is a fraction
PARTS = ("forward", "recomputation", "backward", "adapter", "attention", "head")


@dataclass(frozen=True)
class Floor:
    """The floor of an optimizer step, in seconds by part, and what stands behind it.

    Attributes:
        parts: forward, recomputation, backward, adapter, attention, head, dequantization.
        operations: floating-point operations of the products.
        dequantized: weights dequantized.
        product_operations_s, dequantized_weights_s: the mean rates.
    """

    parts: dict[str, float]
    operations: float
    dequantized: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def product_operations_s(self) -> float:
        return self.operations / (self.seconds - self.parts["dequantization"])

    @property
    def dequantized_weights_s(self) -> float:
        return self.dequantized / self.parts["dequantization"] if self.dequantized else 0.0

    def to_json(self) -> dict[str, Any]:
        rates = {name: getattr(self, name) for name in ("product_operations_s", "dequantized_weights_s")}
        counts = {"operations": self.operations, "dequantized": self.dequantized}
        return {"seconds": self.seconds, "parts": self.parts} | counts | rates


def recomputed_blocks(shapes: ModelShapes, recipe: Recipe) -> int:
    """Blocks whose forward runs twice; where nobody has decided yet (`auto`), the least: none."""
    wanted = recipe.memory.gradient_checkpointing
    if isinstance(wanted, bool):
        return shapes.layers if wanted else 0
    return 0 if wanted == "auto" else min(wanted, shapes.layers)


def count_products(shapes: ModelShapes, recipe: Recipe) -> dict[str, Products]:
    """The products of one micro-batch of full rows, each its own document, by part of the step.

    Block 0's attention inputs need no gradient of x: the embedding is frozen. The product of the MLP's last linear is
    not needed again in recomputation, only its input (and x A, for B's gradient).
    """
    row, count = shapes.architecture, tokens(recipe)
    work: dict[str, Products] = {part: defaultdict(float) for part in PARTS}
    not_again = shapes.layers - recomputed_blocks(shapes, recipe)
    for layer, selected in enumerate(targets(shapes, recipe)):
        for linear in shapes.linears:
            outputs, inputs = linear.out_features, linear.in_features
            recomputed = layer >= not_again
            whole = recomputed and linear.name != row.mlp_out
            needs_x = layer > 0 or linear.name not in row.attention_in
            work["forward"][Product("NT", count, inputs, outputs)] += 1
            work["recomputation"][Product("NT", count, inputs, outputs)] += whole
            work["backward"][Product("NN", count, outputs, inputs)] += needs_x
            if linear in selected:
                _add_branch(work["adapter"], (count, inputs, outputs, recipe.adapter.rank), recomputed + whole, needs_x)
    _add_attention(work["attention"], shapes, recipe)
    chunk, vocabulary = loss_chunk_tokens(recipe), shapes.vocabulary
    chunks = recipe.train.micro_batch * (recipe.data.seq_len - 1) / chunk  # of the learned positions
    work["head"][Product("NT", chunk, shapes.hidden, vocabulary)] += chunks
    work["head"][Product("NN", chunk, vocabulary, shapes.hidden)] += chunks
    return work


def _add_branch(work: Products, sizes: tuple[int, int, int, int], again: int, needs_x: bool) -> None:
    """x A^T and its B, recomputed (`again` 2) or only x A^T (1); gradients of B and A, and through B and A."""
    count, inputs, outputs, rank = sizes
    work[Product("NT", count, inputs, rank)] += 1 + (again > 0)
    work[Product("NT", count, rank, outputs)] += 1 + (again > 1)
    work[Product("NN", count, outputs, rank)] += 1
    work[Product("TN", rank, count, inputs)] += 1
    work[Product("TN", outputs, count, rank)] += 1
    work[Product("NN", count, rank, inputs)] += needs_x


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
    backward (`memory.keep_dequantized`); micro-batches that run together share it. `auto` counts as the least.
    """
    needed: Counter[tuple[int, int]] = Counter()
    if recipe.model.quantization == "none":
        return needed
    together, again = recipe.memory.micro_batches_together, recomputed_blocks(shapes, recipe)
    runs = 1 if together == "auto" else -(-recipe.train.grad_accumulation // together)
    kept = again > 0 and recipe.memory.keep_dequantized is not False
    for linear in shapes.linears:
        uses = 2 * shapes.layers
        if not kept:
            uses += again if linear.name != shapes.architecture.mlp_out else 0
            uses -= linear.name in shapes.architecture.attention_in  # block 0's: no gradient of x
        needed[linear.out_features, linear.in_features] += runs * uses
    return needed


# ------------------------------------------------------------------------------------------------------- timing


def floor_seconds(shapes: ModelShapes, recipe: Recipe, device: torch.device | str = "cpu") -> Floor:
    """Count the work of an optimizer step and time it, with the threads that torch now has."""
    device, dtype = torch.device(device), getattr(torch, recipe.model.dtype)
    parts, operations, known = {}, 0.0, {}  # type: tuple[dict[str, float], float, dict[Product, float]]
    for part, products in count_products(shapes, recipe).items():
        for product in products.keys() - known.keys():
            known[product] = time_product(product, device, dtype)
        accumulated = recipe.train.grad_accumulation
        parts[part] = accumulated * sum(count * known[product] for product, count in products.items())
        operations += accumulated * sum(count * product.operations for product, count in products.items())
    weights = dequantizations(shapes, recipe)
    seconds = sum(count * time_dequantize(shape, recipe, device, dtype) for shape, count in weights.items())
    parts["dequantization"] = seconds
    return Floor(parts, operations, sum(count * shape[0] * shape[1] for shape, count in weights.items()))


def best(function: Callable[[], object], device: torch.device) -> float:
    """The shortest of several runs, in seconds."""
    shortest, started, runs = float("inf"), time.perf_counter(), 0
    while runs <= REPEATS or time.perf_counter() - started < REPEAT_SECONDS:
        start = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        if runs:  # the first compiles kernels
            shortest = min(shortest, time.perf_counter() - start)
        runs += 1
    return shortest


def time_product(product: Product, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of one product; as `F.linear` or into a tensor that is there, whichever is faster."""
    m, k, n = product.m, product.k, product.n
    lead = (product.batch,) if product.batch > 1 else ()
    transposed_left, transposed_right = product.form[0] == "T", product.form[1] == "T"
    stored = torch.randn(*lead, *((k, m) if transposed_left else (m, k)), device=device, dtype=dtype)
    left = stored.mT if transposed_left else stored
    weight = torch.randn(*lead, *((n, k) if transposed_right else (k, n)), device=device, dtype=dtype)
    right = weight.mT if transposed_right else weight
    out = torch.empty(*lead, m, n, device=device, dtype=dtype)
    seconds = best(lambda: torch.matmul(left, right, out=out), device)
    if product.form == "NT" and product.batch == 1:
        seconds = min(seconds, best(lambda: F.linear(left, weight), device))
    return seconds


def time_dequantize(shape: tuple[int, int], recipe: Recipe, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds to dequantize one linear, [O, I], into a buffer that is there."""
    layout = nf4.state_shapes(shape[0] * shape[1], recipe.model.double_quant)
    stored = {name: torch.zeros(size, dtype=kind, device=device) for name, (size, kind) in layout.items()}
    stored["codes"].random_(0, 256)
    out = torch.empty(shape, dtype=dtype, device=device)
    kind = recipe.model.quantization
    return best(lambda: nf4.dequantize(stored, shape, kind, dtype, out=out), device)
