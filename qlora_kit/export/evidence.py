"""What merging costs an update, tensor by tensor, from a sample of each one's rows.

Why: whether to merge onto the original weights, in which dtype, or into 4 bits again, is a question of sizes: the error
of quantization, or the step of the output, against the update. How: the first rows of a weight, in whole blocks of 64,
are updated in fp64, rounded, and compared; so it costs the same for every model, and stands in every report.
Imported by: output.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qlora_kit.adapters.updates import StoredBranch
from qlora_kit.base.shards import Shards
from qlora_kit.export.onto import FOUR_BITS, Quantization
from qlora_kit.export.rounding import round_once

if TYPE_CHECKING:
    from qlora_kit.export.merge import Merge

SAMPLE = 1 << 18  # elements of a weight that evidence is taken from: its first rows
SAMPLE_ROWS = 64  # a multiple of them: blocks of 64 stay whole, also in weights that are stored transposed

Row = dict[str, float | None]


def evidence(merge: Merge) -> dict[str, Any]:
    """For each merged tensor, from a sample of its rows, and as the median over tensors:

    `quantization_error` norm of (4-bit copy - original) over that of the update; null where there is no original
    `rounding_error`     norm of what rounding to the output dtype takes from the sum, over that of the update
    `unchanged`          share of elements that are the base's after rounding

    and of a model that is quantized again:

    `requantization_error`  norm of (what was written - the exact sum) over that of the update
    `surviving`             how far quantized weights moved along the update, over its length: 1 all of it, 0 nothing
    `unchanged`             share of weights that keep the base's 4-bit code
    """
    found = {name: row for name in merge.weights.entries if (row := _evidence(merge, name)) is not None}
    columns: dict[str, list[float]] = {key: [] for row in found.values() for key in row}
    for row in found.values():
        for key, value in row.items():
            columns[key] += [] if value is None else [value]
    medians = {key: statistics.median(column) if column else None for key, column in columns.items()}
    return {"median": medians, "tensors": found}


def _evidence(merge: Merge, name: str) -> Row | None:
    """One tensor's; None: the adapter does not touch it, or (DoRA) scales it as a whole: there is no sum to judge."""
    branch = merge.changes.branches.get(merge.linear(name))
    if branch is None or branch.magnitude is not None:
        return None
    transposed = merge.base.shapes.architecture.transposed
    before = _sample(merge.weights if merge.base.packed is not None else merge.base.stored, name)
    update = _update(branch, len(before), transposed)
    if merge.onto == FOUR_BITS:
        before, update = (value.t().contiguous() if transposed else value for value in (before, update))
        return _requantized(before, update, merge.quantization)
    size = update.norm().item()
    if size == 0.0:
        return {"quantization_error": None, "rounding_error": None, "unchanged": 1.0}
    exact = before.double() + update
    rounded = round_once(exact, merge.dtype)
    error = None
    if merge.base.packed is None and merge.quantization.quant_type != "none":
        weight = before.t() if transposed else before
        error = (merge.quantization.through(weight.contiguous()).double() - weight.double()).norm().item() / size
    return {
        "quantization_error": error,
        "rounding_error": (rounded.double() - exact).norm().item() / size,
        "unchanged": (rounded == before.to(merge.dtype)).double().mean().item(),
    }


def _update(branch: StoredBranch, rows: int, transposed: bool) -> Tensor:
    """scale B A of the first rows as the files store them, fp64."""
    left, right = (branch.lora_A.t(), branch.lora_B.t()) if transposed else (branch.lora_B, branch.lora_A)
    return branch.scale * (left[:rows].double() @ right.double())


def _requantized(before: Tensor, update: Tensor, quantization: Quantization) -> Row:
    """Of a sample [O, I] of the base, original or dequantized."""
    length = update.square().sum().item()
    if length == 0.0:
        return {"requantization_error": None, "surviving": None, "unchanged": 1.0}
    exact = before.double() + update
    stored = [quantization.quantized(value) for value in (before, round_once(exact, quantization.dtype))]
    trained, written = (quantization.dequantized(parts, tuple(before.shape)).double() for parts in stored)
    return {
        "requantization_error": (written - exact).norm().item() / length**0.5,
        "surviving": ((written - trained) * update).sum().item() / length,
        "unchanged": _same_codes(*(parts["codes"] for parts in stored)),
    }


def _same_codes(codes: Tensor, others: Tensor) -> float:
    """Share of 4-bit codes that are equal; two lie in each byte."""
    different = codes ^ others
    return 1 - (((different & 15) != 0).double().mean().item() + ((different >> 4) != 0).double().mean().item()) / 2


def _sample(shards: Shards, name: str) -> Tensor:
    """The first rows of a tensor as its file stores it."""
    rows, columns = shards.entry(name).shape
    wanted = min(rows, max(SAMPLE_ROWS, SAMPLE // columns // SAMPLE_ROWS * SAMPLE_ROWS))
    return shards.rows(name)(0, wanted)
