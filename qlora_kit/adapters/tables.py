"""Embedding and head while they are trained: whole, or with a LoRA branch. What the lookup and the loss read from.

Why: such a table is gigabytes, and so are a second gradient of it, and the fp32 copies that an optimizer's step makes.
How: trained whole, a table is pieces of rows that share one memory, each a parameter of its own, so that optimizer and
clipping work on one piece at a time. Lookup and loss put gradients straight into `.grad`, rows that were used and tiles
of the product with p; nothing as tall as the vocabulary is made beside it. A branch is never put into the table: a row
of the head becomes [W_v, B_v], and what it is multiplied with [x, s A x].
Shapes: V vocabulary, D hidden, R rank, U distinct ids, v rows. Imported by: adapters.inject, store, tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.adapters.lora import LoRABranch
from qlora_kit.base.owners import hand_over
from qlora_kit.base.vocabulary import NO_PADDING, ResidentTable
from qlora_kit.planning.trained import TABLE_ROWS


class TrainedTable(ResidentTable):
    """An embedding or head that is trained whole, on the device.

    Attributes:
        pieces: TABLE_ROWS rows each, or the rest; views of `weight`.
    """

    padding_id = NO_PADDING

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.pieces = [nn.Parameter(rows) for rows in weight.split(TABLE_ROWS)]
        self.trained, self.parameter = self, self.pieces[0]  # type: ignore[misc, assignment]

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows, [U, D], through which gradients flow; see `Table.rows`."""
        return _Lookup.apply(self, ids, self.parameter)

    def gradient(self, start: int, stop: int) -> Tensor:
        """See `vocabulary.Trained`; `stop` lies in the piece of `start`."""
        self._make_gradients()
        first = start // TABLE_ROWS * TABLE_ROWS
        grad = self.pieces[start // TABLE_ROWS].grad
        assert grad is not None
        return grad[start - first : stop - first]

    def add_gradient(self, ids: Tensor, grad_UD: Tensor) -> None:
        """Add to the gradients of some rows.

        Args:
            ids: [U], on the host, ascending, each once.
        """
        starts = torch.arange(0, self.shape[0] + TABLE_ROWS, TABLE_ROWS)
        bounds = torch.searchsorted(ids, starts).tolist()
        for start, (first, last) in zip(starts.tolist(), itertools.pairwise(bounds)):
            if first < last:
                here = (ids[first:last] - start).to(grad_UD.device)
                self.gradient(start, start + TABLE_ROWS).index_add_(0, here, grad_UD[first:last])

    def _make_gradients(self) -> None:
        """Zeros, of all pieces: the optimizer steps on rows without a gradient too, as on any tensor's."""
        for piece in self.pieces:
            if piece.grad is None:
                piece.grad = torch.zeros_like(piece)
                hand_over("gradients", [piece.grad])


class _Lookup(torch.autograd.Function):
    """Ids -> rows of a trained table; then one of its pieces, for the graph to see."""

    @staticmethod
    def forward(ctx: Any, table: TrainedTable, ids: Tensor, piece: Tensor) -> Tensor:
        ctx.table, ctx.ids = table, ids
        return ResidentTable.rows(table, ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_UD: Tensor) -> tuple[None, None, None]:
        keep = ctx.ids != ctx.table.padding_id
        ctx.table.add_gradient(ctx.ids[keep], grad_UD[keep.to(grad_UD.device)])
        return None, None, None


class BranchedTable:
    """A frozen embedding or head, wherever it lives, with a branch that is trained: W + s B A, B [V, R] and A [R, D].

    An embedding's rows have no dropout, as PEFT's have none.
    """

    padding_id = NO_PADDING

    def __init__(self, inner: Any, branch: LoRABranch) -> None:
        self.inner, self.branch, self.trained, self.parameter = inner, branch, self, branch.lora_B
        self.shape, self.dtype, self.is_resident = inner.shape, inner.dtype, inner.is_resident

    def rows(self, ids: Tensor) -> Tensor:
        """See `Table.rows`; gradients flow into the branch."""
        frozen = self.inner.rows(ids)
        lora_B = self.branch.lora_B.index_select(0, ids.to(frozen.device)).to(frozen.dtype)
        is_padding = (ids == self.padding_id).to(frozen.device)[:, None]
        lora_B = torch.where(is_padding, lora_B.detach(), lora_B)
        return torch.addmm(frozen, lora_B, self.branch.lora_A.to(frozen.dtype), alpha=self.branch.scale)

    def chunks(self, count: int) -> Iterator[tuple[int, Tensor]]:
        """Rows [v, D + R]; see `vocabulary.Head`."""
        for start, rows in self.inner.chunks(count):
            lora_B = self.branch.lora_B.detach()[start : start + len(rows)]
            yield start, torch.cat([rows, lora_B.to(rows.dtype)], dim=1)

    def widened(self, hidden: Tensor) -> Tensor:
        """[..., D + R]; see `vocabulary.Head`."""
        dropout = self.branch.dropout()
        dropped = hidden if dropout is None else hidden * dropout(torch.ones_like(hidden))
        down = torch.nn.functional.linear(dropped, self.branch.lora_A.to(hidden.dtype)) * self.branch.scale
        return torch.cat([hidden, down], dim=-1)

    def gradient(self, start: int, stop: int) -> Tensor:
        """See `vocabulary.Trained`."""
        lora_B = self.branch.lora_B
        if lora_B.grad is None:
            lora_B.grad = torch.zeros_like(lora_B)
            hand_over("gradients", [lora_B.grad])
        return lora_B.grad[start:stop]
