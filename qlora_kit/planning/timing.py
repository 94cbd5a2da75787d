"""How long an optimizer step will take: what it computes at a card's rates, against what it fetches meanwhile.

Why: switches of `memory` trade time for bytes, so a plan must say how much of it. How: each product of
planning/operations takes the longer of its arithmetic and its memory traffic; added are the dequantizations and what
lies between the products, both bound by memory. Copies of streamed blocks, of the head and of block inputs run beside
the compute, so a step takes the longer of both. Loading, evaluation, saving and the optimizer are not in it.
The constants below are assumptions, not measurements: no GPU was at hand. A card's rates come from planning/gpus; a
file of rates that somebody measured on this machine (`planning.calibration`) goes before them. A device without rates,
such as a CPU, has an estimate after its first run: by the operations a second that the run's whole steps came to.
Imports no torch. Imported by planning/planner.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from qlora_kit.planning import activations, block, components
from qlora_kit.planning.calibration import calibrated
from qlora_kit.planning.gpus import CARDS, Card
from qlora_kit.planning.hardware import Device
from qlora_kit.planning.operations import Products, count_products, dequantizations
from qlora_kit.planning.quantities import host_blocks, recomputed_blocks, resident_blocks, together, value_bytes
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.recipe import Recipe

PRODUCT_SHARE = 0.7  # of the datasheet's rate, in large bf16 products: vendors' libraries reach 60 to 90 %
ATTENTION_SHARE = 0.35  # fused attention with a mask, forward and backward: about half of what large products reach
MEMORY_SHARE = 0.75  # of the datasheet's bandwidth, in kernels that only read and write
PCIE_LANE_BYTES_S = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9}  # one lane, one direction, after encoding (PCI-SIG)
PCIE_SHARE = 0.8  # of the lanes' rate, in copies from pinned memory
DISK_BYTES_S = 3e9  # sequential reads of an NVMe disk
PACKED_BYTES = 0.516  # of a weight in NF4 with double quantization, read to dequantize it
PASSES = 6  # over the bytes that a block saves: written and read in forward, in recomputation and in backward
LAUNCH_S = 1.5e-3  # Python and kernel launches of one block, forward and backward: what small shapes cannot go below

OTHER_CARDS = {"ti", "super", "laptop", "max", "mobile", "d"}  # words of a driver's name that make it another card


@dataclass(frozen=True)
class Rates:
    """What a device reaches.

    Attributes:
        products_s, attention_s: operations a second.
        memory_bytes_s: of its own memory.
        dequantized_weights_s: weights dequantized a second.
        host_bytes_s, disk_bytes_s: what arrives from host memory, and from a disk.
    """

    products_s: float
    attention_s: float
    memory_bytes_s: float
    dequantized_weights_s: float
    host_bytes_s: float
    disk_bytes_s: float


@dataclass(frozen=True)
class Estimate:
    """Seconds of an optimizer step by what takes them, and of the run where its number of steps is known."""

    compute_s: float
    transfer_s: float
    steps: int | None

    @property
    def step_s(self) -> float:
        return max(self.compute_s, self.transfer_s)

    @property
    def run_s(self) -> float | None:
        return None if self.steps is None else self.steps * self.step_s

    @property
    def bound_by(self) -> Literal["compute", "transfer"]:
        return "compute" if self.compute_s >= self.transfer_s else "transfer"

    def to_json(self) -> dict[str, Any]:
        """What `plan --json` prints under "estimated"."""
        return {"step_s": self.step_s, "run_s": self.run_s, "bound_by": self.bound_by}


# ------------------------------------------------------------------------------------------------------- rates


def rates_of(device: Device, recipe: Recipe) -> Rates | None:
    """What a device reaches with the recipe's dtype; None: nobody knows."""
    measured = _measured(device.name)
    if measured is not None:
        return measured
    card = card_of(device) if device.kind == "cuda" else None
    if card is None or recipe.model.dtype == "float32" or (recipe.model.dtype == "bfloat16" and not card.has_bf16):
        return None
    memory_bytes_s = MEMORY_SHARE * card.gigabytes_s * 1e9
    generation, lanes = card.pcie
    return Rates(
        products_s=PRODUCT_SHARE * card.teraflops * 1e12,
        attention_s=ATTENTION_SHARE * card.teraflops * 1e12,
        memory_bytes_s=memory_bytes_s,
        dequantized_weights_s=memory_bytes_s / (PACKED_BYTES + value_bytes(recipe)),
        host_bytes_s=PCIE_SHARE * lanes * PCIE_LANE_BYTES_S[generation],
        disk_bytes_s=DISK_BYTES_S,
    )


def _measured(name: str) -> Rates | None:
    """The rates of a device in the calibration file; None: no file, no such device, or one is lacking."""
    found = calibrated(name)
    names = [field.name for field in fields(Rates)]
    return Rates(**{key: found[key] for key in names}) if found.keys() >= set(names) else None


def card_of(device: Device) -> Card | None:
    """The row of the catalogue for a card as `--gpu` or the driver names it; None: not in it.

    A driver says "NVIDIA GeForce RTX 4060 Ti" for two sizes, so the memory has to agree too.
    """
    if device.name in CARDS:
        return CARDS[device.name]
    words = set(re.findall(r"[a-z0-9]+", device.name.lower()))

    def named(key: str) -> set[str]:
        return {word for word in key.split("-") if re.fullmatch(r"\d+gb", word) is None}

    def agrees(key: str) -> bool:
        sizes = sorted((device.installed_bytes, CARDS[key].memory_bytes))
        return named(key) <= words and not (words - named(key)) & OTHER_CARDS and sizes[0] > 0.9 * sizes[1]

    found = max(filter(agrees, CARDS), key=lambda key: len(named(key)), default=None)
    return None if found is None else CARDS[found]


# ------------------------------------------------------------------------------------------------------- a step


def estimate(shapes: ModelShapes, recipe: Recipe, device: Device) -> Estimate | None:
    """The time of a recipe without an `auto`, its rows full; None where the device's rates are not known."""
    rates = rates_of(device, recipe)
    if rates is not None:
        return Estimate(_compute(shapes, recipe, rates), _transfer(shapes, recipe, rates), recipe.train.steps)
    overall_s = calibrated(device.name).get("operations_s")
    if overall_s is None:
        return None
    return Estimate(step_operations(shapes, recipe) / overall_s, 0.0, recipe.train.steps)


def step_operations(shapes: ModelShapes, recipe: Recipe) -> float:
    """Operations of all products of an optimizer step, its rows full."""
    parts = count_products(shapes, recipe).values()
    micro_batch = sum(count * product.operations for part in parts for product, count in part.items())
    return recipe.train.grad_accumulation * micro_batch


def _compute(shapes: ModelShapes, recipe: Recipe, rates: Rates) -> float:
    """Seconds of a step's kernels, or of launching them where that takes longer."""
    work = count_products(shapes, recipe)
    attention = sum(count * product.operations for product, count in work.pop("attention").items())
    products = sum(_products(part, value_bytes(recipe), rates) for part in work.values())
    again = recomputed_blocks(shapes, recipe) / shapes.layers
    passes = shapes.layers * PASSES * (2 + again) / 3
    between = passes * block.block_saved(shapes, recipe) / rates.memory_bytes_s
    micro_batch = max(products + attention / rates.attention_s + between, shapes.layers * LAUNCH_S)
    weights = sum(count * rows * columns for (rows, columns), count in dequantizations(shapes, recipe).items())
    return recipe.train.grad_accumulation * micro_batch + weights / rates.dequantized_weights_s


def _products(products: Products, size: int, rates: Rates) -> float:
    """Each takes the longer of its arithmetic and of reading and writing its values, of `size` bytes each."""
    return sum(
        count * max(product.operations / rates.products_s, product.values * size / rates.memory_bytes_s)
        for product, count in products.items()
    )


def _transfer(shapes: ModelShapes, recipe: Recipe, rates: Rates) -> float:
    """Seconds of a step's copies to and from the device.

    A streamed block arrives for forward and for backward of each group of micro-batches, but the last ones, which are
    still in their slots; a fetched head once. Offloaded block inputs go and come back.
    """
    streamed, on_host = shapes.layers - resident_blocks(shapes, recipe), host_blocks(shapes, recipe)
    arrivals = 2 * streamed - min(streamed, components.SLOTS)
    each = arrivals / streamed * components.block_weights(shapes, recipe) if streamed else 0.0
    moved = {"host": on_host * each, "disk": (streamed - on_host) * each}
    for tier in moved:
        moved[tier] += 2 * activations.offloaded_inputs(shapes, recipe, tier)
        if recipe.memory.embeddings == tier:
            moved[tier] += shapes.vocabulary * shapes.hidden * value_bytes(recipe)
    groups = -(-recipe.train.grad_accumulation // together(recipe))
    return groups * (moved["host"] / rates.host_bytes_s + moved["disk"] / rates.disk_bytes_s)
