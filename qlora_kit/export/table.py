"""A merge's report as a short table for people. Imported by: the `merge` command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from qlora_kit.console import stdout
from qlora_kit.export.onto import FOUR_BITS
from qlora_kit.export.output import MergeReport
from qlora_kit.units import format_bytes


def merge_table(report: MergeReport, out: Path) -> None:
    """Print what was merged, on what grounds, and what the proof found."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in _rows(report, out):
        table.add_row(*row)
    stdout.print(table)


def _rows(report: MergeReport, out: Path) -> list[tuple[str, str]]:
    onto = "and quantized again" if report.onto == FOUR_BITS else f"onto the {report.onto} weights"
    tensors = f"{report.merged_tensors} tensors merged {onto}, {report.copied_tensors} copied"
    rows = [("merged", f"{out}: {format_bytes(report.bytes_written)} {report.dtype}, {tensors}")]
    rows += _evidence_rows(report.evidence["median"], report.dtype)
    if report.proof is not None:
        rows += _requantized_rows(report.proof) if report.onto == FOUR_BITS else _proof_rows(report.proof)
    return rows


def _evidence_rows(median: dict[str, float | None], dtype: str) -> list[tuple[str, str]]:
    rows = []
    if median.get("surviving") is not None:
        rows.append(("of the update", f"{median['surviving']:.0%} survives 4 bits (median tensor)"))
        error = f"{median['requantization_error']:.3g} x the update's norm"
        rows.append((f"rounding to {dtype}", f"{error}; {median['unchanged']:.1%} of the weights keep the base's code"))
    if median.get("quantization_error") is not None:
        rows.append(("4-bit error", f"{median['quantization_error']:.3g} x the update's norm (median tensor)"))
    if median.get("rounding_error") is not None:
        lost = f"{median['rounding_error']:.2%} of the update's norm"
        rows.append((f"rounding to {dtype}", f"{lost}; {median['unchanged']:.1%} of the weights stay the base's"))
    return rows


def _requantized_rows(proof: dict[str, Any]) -> list[tuple[str, str]]:
    """What quantizing again cost, and that the folder is what was scored."""
    kept = f"{proof['changed']} as the adapter says and quantized, {proof['unchanged']} bit for bit the base's"
    losses = f"{proof['merged_loss']:.4f}, live adapter model {proof['live_loss']:.4f}, base {proof['base_loss']:.4f}"
    apart = proof["distance"]
    logits = f"KL {apart['kl']:.5f} nats per token, same top token {apart['top1']:.2%} against the live adapter model"
    again = f"loss {proof['reloaded_loss']:.4f} by plain transformers, KL {proof['reloaded']['kl']:.5f} from the above"
    return [
        ("tensors", kept),
        ("in 4 bits again", f"loss {losses} ({proof['tokens']:,} tokens)"),
        ("logits", logits),
        ("reloaded", again),
    ]


def _proof_rows(proof: dict[str, Any]) -> list[tuple[str, str]]:
    rows, choice, distance = [], proof["choice"], proof["distance"]
    if choice is not None:
        for onto in ("dequantized", "original"):
            found = choice[onto]
            agree = f"KL {found['kl']:.5f}, same top token {found['top1']:.2%} against the trained model"
            rows.append((f"onto {onto}", f"loss {found['loss']:.4f}, {agree}"))
        rows.append(("chosen", f"{choice['onto']}: {choice['why']}"))
    rows.append(
        ("tensors", f"{proof['changed']} changed as the adapter says, {proof['unchanged']} bit for bit the base's")
    )
    losses = (
        f"loss {proof['merged_loss']:.4f}, live adapter model {proof['live_loss']:.4f} ({proof['tokens']:,} tokens)"
    )
    rows.append(("reloaded", losses))
    agree = f"KL {distance['kl']:.5f} nats per token, same top token {distance['top1']:.2%}"
    rows.append(("logits", f"{agree}, largest difference {distance['max_logit']:.3g} ({distance['tokens']:,} tokens)"))
    return rows
