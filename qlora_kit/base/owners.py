"""Who owns memory, said where it is made: the ledger's component of what is allocated, and how far a step has come.

Why: a tracker (`profiling.tracker`) and the simulated accelerator see bytes come and go, not what they are for.
How: `owner` tags what is made in a block, `hand_over` gives to a component what was made before, `mark` names the part
of a step that begins. The tag is a thread-local object of torch's, which the threads of backward inherit. What nobody
tags is an activation. Without a listener `hand_over` and `mark` are one comparison each.
Imported by: workspace, slots; training.loss, blocks, loop; profiling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

_OWNER = "qlora_kit.owner"


class Listener(Protocol):
    """Who is told; one at a time."""

    def hand_over(self, component: str, tensors: Iterable[Tensor | None]) -> None: ...

    def mark(self, part: str, block: int | None) -> None: ...


_listener: Listener | None = None


@contextlib.contextmanager
def owner(component: str) -> Iterator[None]:
    """Tag what is allocated in this block, and in a backward that it starts: `with owner("logits"): ...`."""
    before = current_owner()
    torch._C._stash_obj_in_tls(_OWNER, component)
    try:
        yield
    finally:
        torch._C._stash_obj_in_tls(_OWNER, before)


def current_owner() -> str:
    """The innermost tag; "" outside of every `owner`."""
    return torch._C._get_obj_in_tls(_OWNER) if torch._C._is_key_in_tls(_OWNER) else ""


def hand_over(component: str, tensors: Iterable[Tensor | None]) -> None:
    """Say that the memory of these tensors is the component's from now on."""
    if _listener is not None:
        _listener.hand_over(component, tensors)


def mark(part: str, block: int | None = None) -> None:
    """Say which part of a step begins: `mark("forward", 3)` for decoder block 3."""
    if _listener is not None:
        _listener.mark(part, block)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the with-block `listener` is told. Raises: RuntimeError: somebody listens already."""
    global _listener
    if _listener is not None:
        raise RuntimeError("somebody follows this process' memory already")
    _listener = listener
    try:
        yield
    finally:
        _listener = None
