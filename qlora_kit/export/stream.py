"""A merged model's tensors into a file: threads read, add and round tiles; one hashes and writes them in order.

A tensor that has to be read whole (one that passes through 4 bits) is read while the tiles of the one before are
computed. Writing goes past the page cache (`files.past_cache`). Imported by: output.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from qlora_kit import files
from qlora_kit.base.shards import DTYPE_NAMES, bytes_of

if TYPE_CHECKING:
    from qlora_kit.export.merge import MergedShards

THREADS = min(8, os.cpu_count() or 1)
T = TypeVar("T")


def write_shard(path: Path, shards: MergedShards, names: list[str]) -> str:
    """One safetensors file, durably; its sha256."""
    entries = [(name, shards.entries[name]) for name in names]
    header = files.safetensors_header(
        ((name, DTYPE_NAMES[entry.dtype], entry.shape, entry.size_bytes) for name, entry in entries), {"format": "pt"}
    )
    digest = hashlib.sha256(header)
    tensors = in_order((partial(_tiles, shards, name) for name in names), threads=1, ahead=1)
    tiles = itertools.chain.from_iterable(tensors)
    with files.atomic_file(path) as file, files.past_cache(file) as write:
        write(header)
        for tile in in_order(tiles):
            data = bytes_of(tile.view(torch.uint8))
            digest.update(data)
            write(data)
    return digest.hexdigest()


def _tiles(shards: MergedShards, name: str) -> list[Callable[[], Tensor]]:
    """A tensor's; one that has to be read whole is read now, while those of the tensor before are computed."""
    return list(shards.tiles(name))


def in_order(jobs: Iterable[Callable[[], T]], *, threads: int = THREADS, ahead: int = 2 * THREADS) -> Iterator[T]:
    """Results of `jobs` in their order; up to `ahead` more are made meanwhile, each in a thread of its own."""
    threads_before = torch.get_num_threads()
    waiting: collections.deque[Future[T]] = collections.deque()
    torch.set_num_threads(1)  # in each thread: tiles are the unit of parallel work
    try:
        with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads_before)
