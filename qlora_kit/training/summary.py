"""What the `train` command says at the end. Imported by: the command, the quickstart."""

from __future__ import annotations

from pathlib import Path

from qlora_kit.recipe import Recipe
from qlora_kit.training.loop import Result
from qlora_kit.training.memory import memory_lines
from qlora_kit.training.report import merge_command
from qlora_kit.units import format_seconds


def print_summary(recipe: Recipe, result: Result) -> None:
    """Loss before and after, predicted against measured memory, where the adapter is and what comes next."""
    output = Path(recipe.output)
    print(f"{result.steps} steps in {format_seconds(result.seconds)}")
    first, last = result.first_evaluation, result.last_evaluation
    if last is not None:
        before = f"{first.loss:.4f} -> " if first is not None and first is not last else ""
        print(f"held-out loss {before}{last.loss:.4f} ({last.tokens:,} tokens), best at step {result.best_step}")
    print("\n".join(memory_lines(output / "memory.json")))
    print(f"adapter in {output / 'adapter'}")
    print(f"curves and memory in {output / 'report.html'}")
    print(f"next: {merge_command(recipe)}")
