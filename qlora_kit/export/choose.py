"""Which weights to merge onto, by measurement: the original ones, or the 4-bit copies that training saw.

Why: both are advised, and both are right somewhere. The dequantized weights give the model that was trained; the
original ones leave the quantization error out, to which the adapter may or may not have grown. How: `evidence`
compares, per tensor, that error with the update, and what rounding leaves of it; where there is held-out text both
candidates are scored in one model in memory, whose linears are replaced. The original weights are taken if their loss
is lower by more than two standard errors over the documents. Imported by: the commands.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qlora_kit.base.shards import Shards
from qlora_kit.export.merge import Merge
from qlora_kit.export.output import MergeReport, write_merged
from qlora_kit.export.rounding import round_once
from qlora_kit.export.score import Rows, Scores, plain_model, score
from qlora_kit.export.verify import Live, live_model, prove

if TYPE_CHECKING:
    from qlora_kit.base.loader import Base

SAMPLE = 1 << 20  # elements of a weight that evidence is taken from: its first rows
SAMPLE_ROWS = 64  # a multiple of them: blocks of 64 stay whole, also in weights that are stored transposed
STANDARD_ERRORS = 2.0


def evidence(merge: Merge) -> dict[str, Any]:
    """For each merged tensor, from a sample of its rows, and as the median over tensors:

    `quantization_error` norm of (4-bit copy - original) over that of the update; null where there is no original
    `rounding_error`     norm of what rounding to the output dtype takes from the sum, over that of the update
    `unchanged`          share of elements that are the base's after rounding
    """
    found = {name: row for name in merge.weights.entries if (row := _evidence(merge, name)) is not None}
    keys = ("quantization_error", "rounding_error", "unchanged")
    columns = {key: [value for row in found.values() if (value := row[key]) is not None] for key in keys}
    return {"median": {key: _median(column) for key, column in columns.items()}, "tensors": found}


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _evidence(merge: Merge, name: str) -> dict[str, float | None] | None:
    """One tensor's; None: the adapter does not touch it, or (DoRA) scales it as a whole: there is no sum to judge."""
    branch = merge.changes.branches.get(merge.linear(name))
    if branch is None or branch.magnitude is not None:
        return None
    transposed = merge.base.shapes.architecture.transposed
    original = _sample(merge.weights if merge.base.packed is not None else merge.base.stored, name)
    left, right = (branch.lora_A.t(), branch.lora_B.t()) if transposed else (branch.lora_B, branch.lora_A)
    update = branch.scale * (left[: len(original)].double() @ right.double())
    size = update.norm().item()
    if size == 0.0:
        return {"quantization_error": None, "rounding_error": None, "unchanged": 1.0}
    exact = original.double() + update
    rounded = round_once(exact, merge.dtype)
    error = None
    if merge.base.packed is None and merge.quantization.quant_type != "none":
        weight = original.t() if transposed else original
        error = (merge.quantization.through(weight.contiguous()).double() - weight.double()).norm().item() / size
    unchanged = (rounded == original.to(merge.dtype)).double().mean().item()
    return {
        "quantization_error": error,
        "rounding_error": (rounded.double() - exact).norm().item() / size,
        "unchanged": unchanged,
    }


def _sample(shards: Shards, name: str) -> Tensor:
    """The first rows of a tensor as its file stores it."""
    rows, columns = shards.entry(name).shape
    wanted = min(rows, max(SAMPLE_ROWS, SAMPLE // columns // SAMPLE_ROWS * SAMPLE_ROWS))
    return shards.rows(name)(0, wanted)


# ------------------------------------------------------------------------------------------------ by held-out text


def merge_and_prove(
    merge: Merge, out: Path, rows: Rows, scratch: Path, *, load: Callable[[str], Base], choose: bool
) -> MergeReport:
    """Choose the base if asked to, merge, prove, and only then give the folder its name.

    Args:
        scratch: a folder for the live model's logits, PROBE_BYTES at most.
        load: the base with its adapter, `auto`: quantized as in training, or `none`: its original weights.
    Raises: what `write_merged` and `prove` raise.
    """
    live = live_model(load("auto"), rows, scratch / "trained")
    trained_on_16_bits = merge.quantization.quant_type == "none"
    choice = None
    if choose and not trained_on_16_bits and merge.base.packed is None:
        choice = compare(merge, live)
        merge = dataclasses.replace(merge, onto=choice["onto"])
    reference = live
    if merge.onto == "original" and not trained_on_16_bits:
        reference = live_model(load("none"), rows, scratch / "original")
    return write_merged(merge, out, lambda folder: {**prove(folder, merge, reference).to_json(), "choice": choice})


def compare(merge: Merge, live: Live) -> dict[str, Any]:
    """Scores of the live model and of both candidates, which is taken, and why."""
    model = plain_model(merge.base.folder, merge.dtype)
    candidates = {}
    for onto in ("dequantized", "original"):
        candidate = dataclasses.replace(merge, onto=onto)
        _fill(model, candidate)
        candidates[onto] = score(model, live.rows, reference=live.logits)
    onto, why = decide(candidates["dequantized"], candidates["original"])
    report: dict[str, Any] = {"onto": onto, "why": why, "live_loss": live.scores.loss}
    for name, found in candidates.items():
        assert found.distance is not None
        report[name] = {"loss": found.loss, **asdict(found.distance)}
    return report


def _fill(model: Any, merge: Merge) -> None:
    """Give the linears of the blocks the merged weights, one at a time."""
    architecture = merge.base.shapes.architecture
    linears = {name for name, _ in merge.base.shapes.linear_weights}
    for name in merge.shards.entries:
        if (name_in_model := architecture.name_in_model(name)) in linears:
            model.get_parameter(name_in_model).data.copy_(merge.shards.read(name))


def decide(dequantized: Scores, original: Scores) -> tuple[str, str]:
    """`original` or `dequantized`, and the reason in words."""
    gains = [a - b for a, b in zip(dequantized.losses, original.losses)]  # above 0: the original is better
    tokens = max(1, dequantized.tokens)
    error = statistics.stdev(gains) * math.sqrt(len(gains)) / tokens if len(gains) > 1 else math.inf
    gain = sum(gains) / tokens
    found = f"the original weights score {gain:+.4f} nats per token better than the dequantized ones, +- {error:.4f}"
    if gain > STANDARD_ERRORS * error:
        return "original", f"{found}: more than {STANDARD_ERRORS:g} standard errors, so they are taken"
    return "dequantized", f"{found}: not more than {STANDARD_ERRORS:g} standard errors, so what training saw is kept"
