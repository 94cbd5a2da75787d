"""What is done when a step or an evaluation runs out of memory: it is repeated with less at a time (`memory.on_oom`).

Why: a run of days must not end at the one step that was a little too large. How: what is repeated has changed nothing
yet: gradients are dropped, rows and dropout are functions of the step, and a step's loss is the mean over all its
learned tokens however they fall into micro-batches. First micro-batches pass the blocks one by one, which changes no
bit; then they are halved until it fits, and the run goes on so: from there it is the run of a recipe with that
`train.micro_batch` and as many rows a step. An optimizer's step is not repeated: some weights would have moved.
Imported by: training.loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from qlora_kit.base.device import clear_freed_memory, is_out_of_memory
from qlora_kit.console import warn
from qlora_kit.training.run import Run

T = TypeVar("T")


def repeat_smaller(run: Run, work: Callable[[], T]) -> T:
    """`work()`, which may leave gradients but nothing else; with smaller micro-batches each time that memory runs out.

    Raises: what `work` does; out of memory too, where the recipe says `fail` or nothing is left to split.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as problem:
            rows = _fewer_rows(run)
            if rows is None or not is_out_of_memory(problem):
                raise
            reason = str(problem).partition("\n")[0]
        run.progress.rows = rows  # here the error is gone, and with it the tensors of its frames
        run.optimizer.zero_grad(set_to_none=True)
        clear_freed_memory(run.base.device)
        warn(
            f"after step {run.progress.step}: {reason}; "
            f"repeated, and from now on, in micro-batches of {rows} row(s), one by one"
        )


def _fewer_rows(run: Run) -> int | None:
    """Rows of a forward to go on with; None: it ends here."""
    if run.recipe.memory.on_oom == "fail" or (run.rows == 1 and run.together == 1):
        return None
    return run.rows if run.together > 1 else (run.rows + 1) // 2
