"""A conversation in the terminal: lines in, answers out as they are made, the history kept.

Why not in `generation`: what is said here, to whom and when, is the terminal's business, and is tested with a list of
lines. How: every turn renders the whole history with the chat template. Ctrl-C ends the answer only, after the token
in hand, so that a base whose blocks are streamed is left whole. Imported by: the `chat` command.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch

from qlora_kit.base.loader import Base, held_weights
from qlora_kit.console import note
from qlora_kit.generation import Sampling, answer

RESET, EXIT = "/reset", "/exit"


def chat(
    base: Base,
    tokenizer: Any,
    lines: Iterable[str],
    say: Callable[[str], None],
    sampling: Sampling,
    *,
    system: str | None = None,
) -> list[dict[str, str]]:
    """Answer each line until they end, or `/exit`; returns the conversation.

    Args:
        lines: one turn of the user each; empty ones are passed over.
        say: takes the pieces of an answer, and a line break after it.
    Raises: DataError: no chat template, or one that refuses the turns.
    """
    opening = [{"role": "system", "content": system}] if system else []
    history = list(opening)
    torch.manual_seed(sampling.seed)
    with held_weights(base):
        for line in map(str.strip, lines):
            if line == EXIT:
                break
            if line == RESET:
                history = list(opening)
                note("the conversation is forgotten")
            elif line:
                history.append({"role": "user", "content": line})
                with _interrupted() as stopped:
                    text = answer(base, tokenizer, history, sampling, say, stopped)
                say("\n")
                history.append({"role": "assistant", "content": text})
    return history


@contextlib.contextmanager
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C stops nothing but what asks here whether it came."""
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def typed_lines() -> Iterator[str]:
    """Lines of stdin: asked for on a terminal, until Ctrl-D; else read until they end."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 - gives `input` a history and keys

    note(f"{RESET} forgets the conversation, {EXIT} or Ctrl-D ends it, Ctrl-C ends an answer")
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def say(text: str) -> None:
    """Show a piece at once."""
    print(text, end="", flush=True)
