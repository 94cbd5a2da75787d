"""The one buffer of a base that weights are dequantized into, over and over.

Why: a fresh tensor for each dequantization costs more than the kernel, most of it in page faults (8 to 18 times on a
CPU), and leaves an allocator in pieces. How: without holding, each weight overwrites the one before, which the product
has used by then. While `holding`, weights lie side by side and a second use finds them there: within a block's
backward between recomputation and gradient, or while several micro-batches pass one block.
Imported by: base.linear (takes weights), base.loader (makes one for each base), training.blocks (says when to hold).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from qlora_kit.base.owners import owner
from qlora_kit.planning.components import aligned


class Workspace:
    """Room for one dequantized weight, or for those of one block while they are held."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._held: dict[Hashable, Tensor] = {}
        self._used_bytes = 0
        self._holding = False

    @property
    def buffer(self) -> Tensor | None:
        """The room, uint8; None: nothing was dequantized yet."""
        return self._buffer

    def weight(
        self,
        key: Hashable,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        fill: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The weight of `key`, [O, I], made by `fill(room)` unless it is held; good until the next one is asked for.

        While holding, it is good until the holding ends.
        """
        if key in self._held:
            return self._held[key]
        size_bytes = math.prod(shape) * dtype.itemsize
        room = self.reserve(self._used_bytes + size_bytes, device)[self._used_bytes :][:size_bytes]
        weight = fill(room.view(dtype).view(shape))
        if self._holding:
            self._held[key] = weight
            self._used_bytes += aligned(size_bytes)
        return weight

    @contextlib.contextmanager
    def holding(self, capacity_bytes: int, device: torch.device) -> Iterator[None]:
        """Within the with-block each weight is made once and kept; there is room for `capacity_bytes` of them."""
        self.reserve(capacity_bytes, device)
        self._holding = True
        try:
            yield
        finally:
            self._held.clear()
            self._holding, self._used_bytes = False, 0

    def reserve(self, size_bytes: int, device: torch.device) -> Tensor:
        """The room, uint8, at least `size_bytes` of it from now on."""
        if self._buffer is None or self._buffer.numel() < size_bytes or self._buffer.device != device:
            self._buffer = None  # before the larger one is asked for
            with owner("workspace"):
                self._buffer = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        return self._buffer
