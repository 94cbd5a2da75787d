"""A run as one html file, `report.html` in its folder: how it ended, its curves, planned beside measured, what is next.

How: everything is read from the files that the run has left (plan.json, memory.json, metrics.jsonl, recipe.yaml), so
the page can say nothing else than they do. Imports no torch. Imported by: training.loop, training.summary.
"""

from __future__ import annotations

import json
import shlex
from html import escape
from pathlib import Path
from typing import Any

from qlora_kit import files, pages
from qlora_kit.pages import commands, compared, curve, folded, paragraphs, section
from qlora_kit.planning.comparison import OTHER
from qlora_kit.recipe import Recipe, load_recipe
from qlora_kit.units import format_bytes, format_seconds

Lines = list[dict[str, Any]]


def write_report(folder: Path, lines: Lines) -> None:
    """Write `report.html` for the run in a folder. Raises: DiskError: it cannot be written."""
    files.write_text(folder / "report.html", report(folder, lines))


def report(folder: Path, lines: Lines) -> str:
    """The page; `lines` are those of metrics.jsonl."""
    recipe, memory = load_recipe(folder / "recipe.yaml"), json.loads((folder / "memory.json").read_text())
    steps = [line for line in lines if "eval_loss" not in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    head = f'<p class="dim">{escape(recipe.data.train)}, on {memory["measured"]["device"]}</p>'
    sections = [
        section("How it went", paragraphs(_facts(steps, evaluations))),
        section("Step by step", f'<div class="curves">{_curves(steps, evaluations, memory)}</div>'),
        section("Memory at the peak", _memory(memory)),
        section("Next", commands([merge_command(recipe)])),
        folded("the recipe as it ran", recipe.to_yaml()),
    ]
    title = f"run: {recipe.model.path}, {recipe.model.quantization}"
    return pages.page(title, head + _verdict(memory, json.loads((folder / "plan.json").read_text())), sections)


def merge_command(recipe: Recipe) -> str:
    """What makes a model of the run's base and adapter, to be pasted into a shell."""
    output = Path(recipe.output)
    words = ["--model", recipe.model.path, "--adapter", str(output / "adapter"), "--out", str(output / "merged")]
    return f"qlora-kit merge {shlex.join(words)}"


def _verdict(memory: dict[str, Any], plan: dict[str, Any] | None) -> str:
    measured = memory["measured"]["peak_bytes"]
    if plan is None:
        return pages.verdict(True, f"peak memory {format_bytes(measured)}")
    inside = measured <= plan["budget_bytes"]
    sizes = f"{format_bytes(measured)} measured, {format_bytes(plan['peak_bytes'])} planned"
    return pages.verdict(
        inside, f"{'within' if inside else 'over'} the limit of {format_bytes(plan['budget_bytes'])}: {sizes}"
    )


def _facts(steps: Lines, evaluations: Lines) -> list[str]:
    tokens, seconds = (sum(line[key] for line in steps) for key in ("tokens", "step_s"))
    found = [f"{len(steps)} steps in {format_seconds(seconds)}: {tokens:,} tokens, {tokens / seconds:,.0f} a second"]
    if skipped := sum(1 for line in steps if line.get("skipped")):
        found.append(f"{skipped} of them were skipped: their loss or gradient was not finite")
    if evaluations:
        losses = [line["eval_loss"] for line in evaluations]
        best = min(evaluations, key=lambda line: line["eval_loss"])
        found.append(f"held-out loss {losses[0]:.4f} -> {losses[-1]:.4f} nats a token, best at step {best['step']}")
    return found


def _curves(steps: Lines, evaluations: Lines, memory: dict[str, Any]) -> str:
    """Loss, learning rate, speed and memory over the steps."""

    def of(key: str, lines: Lines = steps, less: int = 0) -> list[tuple[float, float]]:
        return [(line["step"], line[key] - less) for line in lines if line[key] is not None]

    libraries = memory["measured"].get("interpreter_bytes", 0)
    planned = memory["planned"] and memory["planned"]["peak_bytes"]
    losses = of("loss")
    dots = of("eval_loss", evaluations)
    drawn = [curve("loss, nats a learned token; dots: held-out", losses, dots=dots)] if losses else []
    drawn += [curve("learning rate", of("lr")), curve("tokens a second", of("tokens_per_s"))]
    caption = "peak memory so far" + ("; dashed: planned" if planned else "")
    drawn.append(curve(caption, of("device_peak_bytes", less=libraries), bound=planned, unit="bytes"))
    return "".join(drawn)


def _memory(memory: dict[str, Any]) -> str:
    """The ledgers side by side, and what the measured one is of."""
    measured = memory["measured"]
    components = measured["components"] | {OTHER: measured.get("other_bytes", 0)}
    said = ["Above: planned, below: measured."] if memory["planned"] else []
    if "peak_at" in measured:
        said.append(
            f"Step {measured['followed_step']} was followed byte by byte; its peak was in: {measured['peak_at']}."
        )
    if "interpreter_bytes" in measured:
        size = format_bytes(measured["interpreter_bytes"])
        said.append(f"The interpreter and its libraries, {size}, are counted in neither.")
    return compared((memory["planned"] or {"components": {}})["components"], components) + paragraphs(said)
