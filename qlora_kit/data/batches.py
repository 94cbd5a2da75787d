"""Examples to tensors: which rows an optimizer step sees, and what the model is given.

Why a pure function of (seed, step): a resumed run then needs no state of its data, and sees no other order.
Order of epoch e: rows sorted by blake2b(seed, e, row). A hash gives the same order on every platform and in
every version of Python and torch; their own shuffles promise that for none.
Packed documents are kept apart by position ids that begin anew at 0: transformers 5 builds a block-diagonal
mask from them (masking_utils.find_packed_sequence_indices) as long as neither an attention mask nor a cache
is given, so call the model with `use_cache=False`, and with sdpa or eager attention. Padding stands on the
right, where causal attention never looks, and counts on, so it needs no mask either.
Shapes: B rows, T tokens of the longest row, padded as `widths.padded_width` says; packed rows are all as wide as the
longest of them, so that every step has one shape.
Imported by training, profiling and evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_kit.data.packing import pack
from qlora_kit.data.tokenize import IGNORE_INDEX, Example
from qlora_kit.widths import padded_width

Row = list[int]  # indices of the examples that share a row


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward pass takes.

    Attributes:
        input_ids: [B, T] int64, padded on the right with pad_id.
        targets: [B, T] int64, already shifted; IGNORE_INDEX where nothing is learned.
        position_ids: [B, T] int64, from 0 in each document; padding counts on.
        learned_tokens: targets that are not IGNORE_INDEX.
        tokens: real ones, without padding.
        documents: per row the lengths of its documents; they sum to `tokens`.
        narrowest: T is at least this, whatever the rows.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor
    learned_tokens: int
    tokens: int
    documents: list[list[int]]
    narrowest: int = 0


def _check(examples: Sequence[Example], seq_len: int) -> None:
    if not examples:
        raise ValueError("no examples")
    for example in examples:
        if len(example.input_ids) > seq_len:
            found = len(example.input_ids)
            raise ValueError(f"{example.source}: {found} tokens, more than seq_len {seq_len}")


@dataclass(frozen=True)
class _Rows:
    """Examples, and which of them share a row.

    Attributes:
        rows: the longest first.
        narrowest: least width of a batch: that of the longest row where rows are packed.
    """

    examples: Sequence[Example]
    rows: list[Row]
    seq_len: int
    narrowest: int
    pad_id: int

    @classmethod
    def form(cls, examples: Sequence[Example], seq_len: int, packing: bool, pad_id: int) -> _Rows:
        """Rows in a fixed order. Raises: ValueError: no examples, or one longer than seq_len."""
        _check(examples, seq_len)
        lengths = [len(example.input_ids) for example in examples]
        rows = pack(lengths, seq_len) if packing else [[index] for index in range(len(examples))]
        rows.sort(key=lambda row: (-sum(lengths[index] for index in row), row))
        longest = sum(lengths[index] for index in rows[0])
        return cls(examples, rows, seq_len, padded_width(longest, seq_len) if packing else 0, pad_id)

    def batches(self, rows: Sequence[Row], size: int) -> list[MicroBatch]:
        """`size` rows at a time, the last fewer."""
        return [self._collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _collate(self, rows: Sequence[Row]) -> MicroBatch:
        documents = [[len(self.examples[index].input_ids) for index in row] for row in rows]
        width = max(self.narrowest, padded_width(max(map(sum, documents)), self.seq_len))
        input_ids = torch.full((len(rows), width), self.pad_id, dtype=torch.long)
        targets = torch.full((len(rows), width), IGNORE_INDEX, dtype=torch.long)
        position_ids = torch.empty((len(rows), width), dtype=torch.long)
        for number, row in enumerate(rows):
            start = 0
            for index in row:
                end = start + len(self.examples[index].input_ids)
                input_ids[number, start:end] = torch.tensor(self.examples[index].input_ids)
                targets[number, start:end] = torch.tensor(self.examples[index].targets)
                position_ids[number, start:] = torch.arange(width - start)  # to the end: padding counts on
                start = end
        return MicroBatch(
            input_ids=input_ids,
            targets=targets,
            position_ids=position_ids,
            learned_tokens=int((targets != IGNORE_INDEX).sum()),
            tokens=sum(map(sum, documents)),
            documents=documents,
            narrowest=self.narrowest,
        )


def split(batches: Sequence[MicroBatch], rows: int) -> list[MicroBatch]:
    """The same rows in the same order, at most `rows` of one micro-batch in a forward.

    Each part is as wide as it would be had it been made of these rows, so nothing but the order of sums depends on it.
    """
    return [part for batch in batches for part in _parts(batch, rows)]


def _parts(batch: MicroBatch, rows: int) -> list[MicroBatch]:
    if len(batch.documents) <= rows:
        return [batch]
    return [_part(batch, slice(start, start + rows)) for start in range(0, len(batch.documents), rows)]


def _part(batch: MicroBatch, rows: slice) -> MicroBatch:
    documents = batch.documents[rows]
    width = max(batch.narrowest, padded_width(max(map(sum, documents)), batch.input_ids.shape[1]))
    targets = batch.targets[rows, :width]
    return replace(
        batch,
        input_ids=batch.input_ids[rows, :width],
        targets=targets,
        position_ids=batch.position_ids[rows, :width],
        learned_tokens=int((targets != IGNORE_INDEX).sum()),
        tokens=sum(map(sum, documents)),
        documents=documents,
    )


class Batches:
    """The endless, repeatable sequence of training batches.

    Args:
        examples: from `load_examples`, each at most seq_len tokens.
        micro_batch: rows of one forward.
        grad_accumulation: forwards of one optimizer step.
        seq_len: tokens of a packed row.
        packing: several examples in a row; the rows are formed once and shuffled anew for each epoch.
        seed: of the order.
        pad_id: any id that the embedding has; nothing is learned from it.
    Raises: ValueError: no examples, or one longer than seq_len.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        micro_batch: int,
        grad_accumulation: int,
        seq_len: int,
        packing: bool,
        seed: int,
        pad_id: int,
    ) -> None:
        self._all = _Rows.form(examples, seq_len, packing, pad_id)
        self._rows = self._all.rows
        self._micro_batch = micro_batch
        self._rows_per_step = micro_batch * grad_accumulation
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])  # the epoch asked for last; a cache, never state

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last may have fewer rows, and counts."""
        return -(-len(self._rows) // self._rows_per_step)

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `step`, from 0, over as many epochs as are asked for."""
        epoch, window = divmod(step, self.steps_per_epoch)
        start = window * self._rows_per_step
        chosen = [self._rows[row] for row in self._epoch(epoch)[start : start + self._rows_per_step]]
        return self._all.batches(chosen, self._micro_batch)

    def longest(self) -> MicroBatch:
        """The micro-batch with the worst shape that any step can have: what fits this, fits the run."""
        return self.worst()[0]

    def worst(self) -> list[MicroBatch]:
        """A step of the longest rows; its first micro-batch is `longest`."""
        return self._all.batches(self._rows[: self._rows_per_step], self._micro_batch)

    def _epoch(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self._rows), self._seed, epoch))
        return self._order[1]


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` rows in an epoch: a fixed function of its arguments, on every machine."""

    def key(row: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{epoch}:{row}".encode(), digest_size=16).digest()

    return sorted(range(count), key=key)


def eval_batches(
    examples: Sequence[Example], *, micro_batch: int, seq_len: int, packing: bool, pad_id: int
) -> list[MicroBatch]:
    """Every example once, the longest rows first: little padding, and if memory is short it shows at once.

    Raises: ValueError: no examples, or one longer than seq_len.
    """
    rows = _Rows.form(examples, seq_len, packing, pad_id)
    return rows.batches(rows.rows, micro_batch)
