"""Where words go: results to stdout, everything else (progress, notes, warnings) to stderr through one rich console.

Imports rich only; rich is imported where a command first prints. Imported by everyone who talks to the user.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape

stderr = Console(stderr=True, highlight=False, soft_wrap=True)
stdout = Console(highlight=False)


def note(text: str) -> None:
    """One remark that the user should see once."""
    stderr.print(f"[dim]note:[/dim] {escape(text)}", markup=True)


def warn(text: str) -> None:
    """Something that may make the result worse than the user expects."""
    stderr.print(f"[yellow]warning:[/yellow] {escape(text)}", markup=True)


@contextlib.contextmanager
def progress(description: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """A progress bar; yields `advance(amount, text)`. Silent where stderr is not a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(description, total=total, text="")

        def advance(amount: float, text: str = "") -> None:
            bar.update(task, advance=amount, text=text)

        yield advance
