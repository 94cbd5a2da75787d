"""Embedding and head of a merged model: taller where tokens were added, two where the adapter made one into two.

Why: a tied model whose embedding or head was trained alone comes back wrong if it is written as tied: transformers
would take the one for the other. So it is untied, in the config too, exactly when the two differ.
How: `Layout` says of every tensor of the output its shape, its shard, and which tensor of the base it is made from.
Imported by: merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlora_kit.adapters.updates import StoredAdapter, TensorUpdate
from qlora_kit.base.shards import Entry
from qlora_kit.planning.shapes import ModelShapes

CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Layout:
    """What a merged model is made of.

    Attributes:
        entries: of the output's tensors by their names in the files; dtypes are the base's.
        sources: name of a tensor -> that of the one in the base's files that it is made from, where it is another.
        config: fields of config.json that change.
    """

    entries: dict[str, Entry]
    sources: dict[str, str]
    config: dict[str, Any]


def lay_out(
    entries: dict[str, Entry], read: Callable[[str], Tensor], adapter: StoredAdapter, shapes: ModelShapes
) -> Layout:
    """The layout of base + adapter.

    Args:
        entries: the tensors of the base's files.
        read: gives one of them.
    """
    row = shapes.architecture
    embedding, head = f"{row.embedding}.weight", f"{row.head}.weight"
    layout = Layout(dict(entries), {}, {})
    files = {row.name_in_model(name): name for name in entries}
    if shapes.tied and not {embedding, head}.isdisjoint(adapter.tensors):
        untied = _differ(adapter, (embedding, head), read(files[embedding]))
        if untied:
            layout.config["tie_word_embeddings"] = False
        if untied or head in files:
            file_of_head = files.setdefault(head, head)
            layout.entries[file_of_head] = entries[files[embedding]]
            layout.sources[file_of_head] = files[embedding]
    for name in (embedding, head):
        if name in adapter.tensors and name in files:
            taller = _of_height(layout.entries[files[name]], adapter.tensors[name])
            layout.entries[files[name]] = taller
            if taller.shape[0] != shapes.vocabulary:
                layout.config["vocab_size"] = taller.shape[0]
    return layout


def _of_height(entry: Entry, update: TensorUpdate) -> Entry:
    shape = (update.height(entry.shape[0]), *entry.shape[1:])
    return replace(entry, shape=shape, size_bytes=math.prod(shape) * entry.dtype.itemsize)


def _differ(adapter: StoredAdapter, names: tuple[str, str], table: Tensor) -> bool:
    """Whether what the adapter makes of the table under two names differs, by chunks of rows."""
    updates = [adapter.tensors.get(name, TensorUpdate()) for name in names]
    heights = {update.height(len(table)) for update in updates}
    for start in range(0, max(heights), CHUNK_ROWS):
        stop = start + CHUNK_ROWS
        chunk = table[start:stop].float()
        if not torch.equal(*(update.rows(start, stop).apply(chunk.clone()) for update in updates)):
            return True
    return False
