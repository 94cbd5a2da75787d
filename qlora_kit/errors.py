"""Every error that a user can cause, and the exit code it ends the command with.

Why one tree: the command line catches `QLoRAKitError` once and prints one line; scripts branch on the exit code.
A message says what was found, where (file:line:field, or tensor), what was expected, and the way out.
A caller's bug stays a `ValueError`. Imported by everything; imports nothing.

    QLoRAKitError
      RecipeError        2   recipe, command line
      DataError          3   training or evaluation data, chat template, labels
      ModelError         4   base model or adapter: missing tensor, wrong shape, other base
      DiskError          5   no space, not writable, vanished
      BudgetError        6   does not fit in memory
      NonFiniteError     7   NaN or infinity in loss, gradient or weights
      CheckpointError    8   no usable checkpoint, or one of another run
      LockedError        9   another process holds the run folder
      Stopped      130 / 143 SIGINT or SIGTERM arrived; state was saved
"""

from __future__ import annotations


class QLoRAKitError(Exception):
    """Base of all errors that are reported as one line, without a traceback."""

    exit_code = 1


class RecipeError(QLoRAKitError):
    exit_code = 2


class DataError(QLoRAKitError):
    exit_code = 3


class ModelError(QLoRAKitError):
    exit_code = 4


class DiskError(QLoRAKitError):
    exit_code = 5


class BudgetError(QLoRAKitError):
    exit_code = 6


class NonFiniteError(QLoRAKitError):
    exit_code = 7


class CheckpointError(QLoRAKitError):
    exit_code = 8


class LockedError(QLoRAKitError):
    exit_code = 9


class Stopped(QLoRAKitError):
    """The run was asked to stop by a signal and saved its state first."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def nearest(word: str, choices: list[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `choices`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
