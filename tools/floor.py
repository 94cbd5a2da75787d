"""The least time that a training step can take on this machine: its matrix products and its dequantizations.

Why: a step's seconds say nothing by themselves; beside its floor they say how much is overhead. How: the products that
QLoRA with recomputation needs are counted by shape (planning/operations), then each distinct shape is timed on this
machine, in this run, the best of several; so is dequantizing each linear into a buffer that is reused. Nothing else is
counted: no norm, no activation function, no softmax, no optimizer, no reading.
Imported by: bench_roofline, prove_fit, gpu_check.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qlora_kit.base import nf4
from qlora_kit.planning.operations import Product, count_products, dequantizations
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.recipe import Recipe

REPEATS, REPEAT_SECONDS = 3, 0.2  # each product is run at least so often, and until so much time went by


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
