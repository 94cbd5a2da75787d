"""Inputs of recomputed blocks, kept away from the device between forward and backward: in host memory, or in a file.

Why: what recomputation keeps, one input a block and micro-batch, grows with depth; away, two are on the device at once.
How: forward keeps inputs in order, backward takes them in about the reverse and says which one is next. An input stays
on the device until two younger ones need its place, so those kept last need not come back when forward turns into
backward. On the CPU the host is the device: the tier "host" keeps inputs where they are.

Memory, for n inputs kept at once, of s bytes each (n: blocks x micro-batches that wait together):

    tier     device   pinned host memory, on an accelerator      file
    device   n s      -                                          -
    host     2 s      n s, and at most a quarter and 8 s more    -
    disk     2 s      s, rounded up to a power of two            n s, each rounded up to 4 KiB

In forward the 2 s are the caller's input and the one before it, which is leaving; in backward the taken one, which is
the caller's, and the one that comes next. Host memory and file stay for the next step; where lengths grow from step to
step, up to 0.6 n s of pinned memory come on top.
Imported by: training.blocks (keeps and takes), training.loop (builds it).
"""

from __future__ import annotations

import collections
import weakref
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_kit.errors import DiskError
from qlora_kit.training.tiers import PinnedMemory, Place, ScratchFile
from qlora_kit.units import format_bytes

IN_FLIGHT = 2  # inputs that the store holds on the device


class Kept:
    """A tensor that is kept, until it is taken or this handle is dropped."""

    def __init__(self, place: Place) -> None:
        self.place: Place | None = place  # None: taken
        self.on_drop: Any = None


class InputStore:
    """Keeps tensors of one device, for one thread at a time and on one compute stream; made by `input_store`.

    Nobody may write into a tensor after it was kept. What comes back has the same shape, dtype and bits, and no graph;
    where it was away it is contiguous. What a handle held that is dropped without `take` is free with the next `keep`.
    """

    def __init__(self, device: torch.device, tier: PinnedMemory | ScratchFile | None, folder: Path) -> None:
        self._device, self._tier, self._folder = device, tier, folder
        self._near: list[Place] = []  # those on the device, oldest first
        self._dropped: collections.deque[Place] = collections.deque()
        if tier is not None:
            weakref.finalize(self, tier.close).atexit = False

    @property
    def away_bytes(self) -> int:
        """Pinned memory, or length of the file, that the store has taken so far."""
        return 0 if self._tier is None else self._tier.size_bytes

    def keep(self, hidden: Tensor) -> Kept:
        """Take `hidden` over; the caller drops it.

        Raises: DiskError: an older input could not be written.
        """
        if self._tier is None:
            return Kept(Place(hidden.detach()))
        self._free_dropped()
        self._make_room()
        place = Place(hidden.detach().contiguous())
        self._tier.send(place)
        self._near.append(place)
        kept = Kept(place)
        kept.on_drop = weakref.finalize(kept, self._dropped.append, place)
        return kept

    def prefetch(self, kept: Kept) -> None:
        """Start bringing it back, unless it is there or on its way; two may be ahead, a third makes the first go again.

        Raises: DiskError: an older input could not be written.
        """
        place = kept.place
        if self._tier is not None and place is not None and place.tensor is None:
            self._make_room()
            self._fetch(place)
            self._near.append(place)

    def take(self, kept: Kept) -> Tensor:
        """The tensor, usable on the current stream; the handle is spent.

        Raises: DiskError: it could not be written or read. ValueError: the handle was spent before.
        """
        place, kept.place = kept.place, None
        if place is None:
            raise ValueError("this input was taken before: `take` spends its handle")
        if self._tier is not None:
            kept.on_drop.detach()
            try:
                if place.tensor is None:
                    self._fetch(place)
                else:
                    self._near.remove(place)
                self._settle(place)
            finally:
                self._free(place)
        assert place.tensor is not None
        return place.tensor

    def _make_room(self) -> None:
        """Let the oldest input leave the device for good, if as many are there as may be."""
        while len(self._near) >= IN_FLIGHT:
            self._settle(self._near[0])
            self._near.pop(0).tensor = None

    def _free_dropped(self) -> None:
        while self._dropped:
            place = self._dropped.popleft()
            if place.tensor is not None:
                self._near.remove(place)
            self._free(place)

    def _fetch(self, place: Place) -> None:
        assert self._tier is not None
        place.tensor = torch.empty(place.shape, dtype=place.dtype, device=self._device)
        self._tier.fetch(place)

    def _settle(self, place: Place) -> None:
        """Wait for the last move. Raises: DiskError: it failed."""
        assert self._tier is not None
        self._tier.wait(place)
        if isinstance(place.failure, OSError):
            raise DiskError(
                f"{self._folder}: cannot hold the offloaded activations, {format_bytes(self.away_bytes)} so far: "
                f"{place.failure.strerror}; free space there, choose another output, or set "
                "memory.activation_offload=host"
            ) from place.failure
        if place.failure is not None:
            raise RuntimeError(f"an input could not be moved: {place.failure}") from place.failure

    def _free(self, place: Place) -> None:
        assert self._tier is not None and place.space is not None
        self._tier.wait(place)
        place.space.take_back(place)


def input_store(tier: Literal["device", "host", "disk"], device: torch.device, folder: Path) -> InputStore:
    """A store on `device` that keeps inputs there, in host memory, or in a file of `folder`.

    Raises: DiskError: `folder` cannot be written.
    """
    if tier == "disk":
        return InputStore(device, ScratchFile(folder, device), folder)
    return InputStore(device, PinnedMemory(device) if tier == "host" and device.type != "cpu" else None, folder)
