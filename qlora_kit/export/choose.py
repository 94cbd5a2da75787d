"""Which weights to merge onto, by measurement: the original ones, or the 4-bit copies that training saw.

Why: both are advised, and both are right somewhere. The dequantized weights give the model that was trained; the
original ones leave the quantization error out, to which the adapter may or may not have grown. How: both candidates
are scored on held-out text in one model in memory, whose linears are replaced. The original weights are taken if their
loss is lower by more than two standard errors over the documents. 4 bits again are never chosen, only asked for.
Imported by: the commands.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters.inject import activate
from qlora_kit.export.merge import Merge
from qlora_kit.export.onto import FOUR_BITS
from qlora_kit.export.output import Check, MergeReport, find_merged, write_merged
from qlora_kit.export.score import Rows, Scores, plain_model, score
from qlora_kit.export.verify import Live, digest_of, live_model, prove, prove_requantized

if TYPE_CHECKING:
    from qlora_kit.base.loader import Base

CANDIDATES = ("dequantized", "original")
STANDARD_ERRORS = 2.0


def merge_and_prove(
    merge: Merge, out: Path, rows: Rows, scratch: Path, *, load: Callable[[str], Base], choose: bool
) -> MergeReport:
    """Choose the base if asked to, merge, prove, and only then give the folder its name.

    Args:
        scratch: a folder for the live model's logits, PROBE_BYTES at most.
        load: the base with its adapter, `auto`: quantized as in training, or `none`: its original weights.
    Raises: what `write_merged`, `prove` and `prove_requantized` raise.
    """
    held_out = digest_of(rows)
    quantized = merge.quantization.quant_type != "none" and merge.base.packed is None  # training saw no 16 bits
    choose = choose and quantized
    if (there := _proved_before(merge, out, held_out, choose)) is not None:
        return there
    base, choice, check = load("auto"), None, None
    reference = live = live_model(base, rows, scratch / "trained")
    if merge.onto == FOUR_BITS:
        check = _requantized_check(merge, live, base)
    del base
    if choose:
        choice = compare(merge, live)
        merge = dataclasses.replace(merge, onto=choice["onto"])
    if merge.onto == "original" and quantized:
        reference = live_model(load("none"), rows, scratch / "original")
    check = check or (lambda folder: prove(folder, merge, reference).to_json())
    return write_merged(merge, out, lambda folder: check(folder) | {"choice": choice, "held_out": held_out})


def _proved_before(merge: Merge, out: Path, held_out: str, chosen: bool) -> MergeReport | None:
    """The report of `out`, if the same question was answered there by the same documents, and all is whole."""
    for onto in CANDIDATES if chosen else (merge.onto,):
        report = find_merged(out, dataclasses.replace(merge, onto=onto).digest, held_out)
        if report is not None and report.proof is not None and (report.proof["choice"] is not None) == chosen:
            return report
    return None


def _requantized_check(merge: Merge, live: Live, base: Base) -> Check:
    """How a folder that is quantized again is proved; `base`, the live model, is first scored without its adapter."""
    from qlora_kit.base.loader import load_base

    activate(base, [])
    base_loss, settings, device = score(base.model, live.rows).loss, base.settings, base.device

    def check(folder: Path) -> dict[str, Any]:
        loaded = load_base(settings.model_copy(update={"path": str(folder), "revision": None}), device)
        return prove_requantized(folder, merge, live, base_loss, loaded).to_json()

    return check


def compare(merge: Merge, live: Live) -> dict[str, Any]:
    """Scores of the live model and of both candidates, which is taken, and why."""
    model = plain_model(merge.base.folder, merge.dtype)
    candidates = {}
    for onto in CANDIDATES:
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
