"""The two tensors as tall as the vocabulary, embedding and head, and what stands in for them where they live elsewhere.

Why: at 128k to 262k rows they are gigabytes, of which a step needs some rows of the one and a pass over the other.
How: such a tensor is a `Table` in host memory (pinned where the device is an accelerator) or in the model's own file.
The embedding looks up the rows of the ids at hand, each distinct one once; the head is brought in by chunks of rows
through two slots (`slots`), which exist during a pass only. Tied ones share one table. Values are cast as they come,
so results are those of tensors on the device, bit for bit.
Memory: during a pass over the head two chunks on the device as the file holds them, and with a file on an accelerator
as many pinned bytes on the host; one chunk more where the file's dtype is not that of computation.
Shapes: V vocabulary, D hidden, U distinct ids, v rows of a chunk.
Imported by: loader (builds them), adapters, training.loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.base.shards import Entry, Shards, bytes_of
from qlora_kit.base.slots import Slots, Source
from qlora_kit.planning.components import LOSS_CHUNK_VOCABULARY

NO_PADDING = -1


class Trained(Protocol):
    """What is trained of a table: the last K columns of its rows.

    Attributes:
        parameter: one that the graph can see; the table puts gradients into `.grad` itself.
        padding_id: of an embedding: this row has no gradient, as in torch's; NO_PADDING: there is none.
    """

    parameter: nn.Parameter
    padding_id: int

    def gradient(self, start: int, stop: int) -> Tensor:
        """Where the gradient of these rows is added up, [stop - start, K]; `start` is a multiple of TABLE_ROWS."""
        ...


class Head(Protocol):
    """What the loss needs of the output projection.

    Attributes:
        shape: [V, D].
        is_resident: its chunks cost nothing to have again.
        trained: None: nothing of it is.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def is_resident(self) -> bool: ...

    @property
    def trained(self) -> Trained | None: ...

    def chunks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, that many rows or the rest) in order; a chunk is valid until the next is asked for.

        A row has D values, or as many as `widened` makes of a hidden state.
        """
        ...

    def widened(self, hidden: Tensor) -> Tensor:
        """What the rows are multiplied with: hidden [..., D], and with a LoRA branch s A x after it."""
        ...


class _Frozen:
    """A table of which nothing is trained."""

    trained: Trained | None = None

    def widened(self, hidden: Tensor) -> Tensor:
        """See `Head`."""
        return hidden


class ResidentTable(_Frozen):
    """An embedding or head whose weight, [V, D], is on the device."""

    is_resident = True

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.shape, self.dtype = weight, tuple(weight.shape), weight.dtype

    def chunks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """Views of the weight; see `Head`."""
        for start in range(0, self.shape[0], rows):
            yield start, self.weight[start : start + rows]

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows, [U, D]; see `Table.rows`."""
        return self.weight.index_select(0, ids.to(self.weight.device))


@dataclass(frozen=True)
class Table(_Frozen):
    """A [V, D] tensor that does not live on the device.

    Attributes:
        device, dtype: where and as what its values are used.
        entry: where it lies in the files `shards`.
        host: its values in host memory, in `dtype`; None: they stay in the file.
    """

    device: torch.device
    dtype: torch.dtype
    shards: Shards
    entry: Entry
    host: Tensor | None = None
    is_resident: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        """[V, D]."""
        return self.entry.shape

    def on_host(self) -> Table:
        """The same in host memory, read once, a chunk of the file in flight; pinned where the device is an accelerator.

        Raises: ModelError: the file cannot be read.
        """
        host = torch.empty(self.entry.shape, dtype=self.dtype, pin_memory=self.device.type != "cpu")
        for start in range(0, len(host), LOSS_CHUNK_VOCABULARY):
            rows = host[start : start + LOSS_CHUNK_VOCABULARY]
            read = torch.empty(rows.shape, dtype=self.entry.dtype)
            self.shards.read_bytes(self._extent(start, len(rows)), _flat(read))
            rows.copy_(read)
        return replace(self, host=host)

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows, [U, D] on the device.

        Args:
            ids: [U], on the host, ascending.
        Raises: IndexError: there is no such row. ModelError: the file cannot be read.
        """
        height = self.entry.shape[0]
        if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < height:
            raise IndexError(f"ids {int(ids[0])} to {int(ids[-1])}: {self.entry.path.name} has {height} embeddings")
        if self.host is not None:
            return self.host.index_select(0, ids).to(self.device)
        found = torch.empty(len(ids), *self.entry.shape[1:], dtype=self.entry.dtype)
        self.shards.read_rows(self.entry, ids.tolist(), _flat(found))
        return found.to(self.device, self.dtype)

    def chunks(self, count: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, `count` rows [v, D] or the rest, on the device) in order, the next ones on their way meanwhile.

        A chunk lies in a slot: it is valid until the next is asked for.
        Raises: ModelError: the file cannot be read.
        """
        stored = self.entry.dtype if self.host is None else self.dtype
        sources = {
            start: self._source(start, min(count, self.entry.shape[0] - start))
            for start in range(0, self.entry.shape[0], count)
        }
        slots = Slots(sources, self.shards, self.device)
        try:
            for start, source in sources.items():
                with slots.lent(start, start + count) as buffer:
                    rows = buffer[: source.size_bytes].view(stored).view(-1, *self.entry.shape[1:])
                    yield start, rows.to(self.dtype)
        finally:
            slots.settle()

    def _source(self, start: int, count: int) -> Source:
        extent = self._extent(start, count)
        if self.host is None:
            return Source(extent.size_bytes, extents=((0, extent),))
        flat = self.host[start : start + count].view(torch.uint8).view(-1)
        return Source(flat.numel(), flat)

    def _extent(self, start: int, count: int) -> Entry:
        """Where rows lie in the file."""
        row_bytes = math.prod(self.entry.shape[1:]) * self.entry.dtype.itemsize
        offset = self.entry.offset + start * row_bytes
        return replace(self.entry, shape=(count, *self.entry.shape[1:]), offset=offset, size_bytes=count * row_bytes)


def _flat(tensor: Tensor) -> memoryview:
    return bytes_of(tensor.view(torch.uint8).view(-1))


class FetchedEmbedding(nn.Module):
    """Stands in the place of an input embedding: looks its rows up in a table.

    Attributes:
        weight: [V, D] on meta, for those who ask for its shape: there are no values.
    """

    def __init__(self, embedding: nn.Embedding, table: Any) -> None:
        super().__init__()
        self.padding_id, embedding.padding_idx = embedding.padding_idx, None
        self.fetch_from(table)
        del embedding.weight  # no parameter any more; an attribute during a lookup
        self.embedding = embedding

    def fetch_from(self, table: Any) -> None:
        """Look rows up in this table from now on."""
        self.table, self.weight = table, _without_values(table)
        if table.trained is not None:
            table.padding_id = NO_PADDING if self.padding_id is None else self.padding_id

    def forward(self, ids: Tensor) -> Tensor:
        """What the model's own embedding (it may scale) makes of ids [...]: [..., D].

        Raises: IndexError: an id without a row. ModelError: the file cannot be read.
        """
        distinct, positions = ids.cpu().unique(return_inverse=True)
        self.embedding.weight = self.table.rows(distinct)
        try:
            return self.embedding(positions.to(ids.device))
        finally:
            del self.embedding.weight


class FetchedHead(nn.Module):
    """Stands in the place of an output projection: brings it in by chunks of rows.

    Called as a module it gives gradients of the hidden state alone; what is trained of it learns by `training.loss`.

    Attributes:
        weight: [V, D] on meta, for those who ask for its shape: there are no values.
    """

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.fetch_from(table)

    def fetch_from(self, table: Any) -> None:
        """Take rows from this table from now on."""
        self.table, self.weight = table, _without_values(table)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of [..., D]."""
        return _ChunkedProduct.apply(self.table.widened(hidden), self.table)


class _ChunkedProduct(torch.autograd.Function):
    """x W^T by chunks of the rows of W, which pass once in forward and once in backward: no chunk may be saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Head) -> Tensor:
        ctx.head, ctx.shape = head, x.shape
        logits = x.new_empty(*x.shape[:-1], head.shape[0])
        for start, rows in head.chunks(LOSS_CHUNK_VOCABULARY):
            logits[..., start : start + len(rows)] = F.linear(x, rows)
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.new_zeros(ctx.shape, dtype=torch.float32)
        for start, rows in ctx.head.chunks(LOSS_CHUNK_VOCABULARY):
            total += grad[..., start : start + len(rows)] @ rows
        return total.to(grad.dtype), None


def head_of(model: Any) -> Head:
    """The output projection of transformers' model as the loss takes it."""
    found: Any = model.get_output_embeddings()
    return found.table if isinstance(found, FetchedHead) else ResidentTable(found.weight)


def _without_values(table: Any) -> Tensor:
    return torch.empty(table.shape, dtype=table.dtype, device="meta")


def fetch_from(model: Any, name: str, table: Any) -> None:
    """Put what fetches from `table` in the place of the model's embedding, or head, whose weight is called `name`."""
    replaced = model.get_submodule(name.removesuffix(".weight"))
    if isinstance(replaced, FetchedEmbedding | FetchedHead):
        replaced.fetch_from(table)
        return
    fetched = FetchedEmbedding(replaced, table) if isinstance(replaced, nn.Embedding) else FetchedHead(table)
    model.set_submodule(name.removesuffix(".weight"), fetched)


def fetch_no_more(model: Any, name: str, weight: nn.Parameter) -> None:
    """Give the model back an embedding or head with a weight on the device, where something fetched stood."""
    fetched = model.get_submodule(name.removesuffix(".weight"))
    if isinstance(fetched, FetchedEmbedding):
        module: nn.Module = fetched.embedding
        module.padding_idx = fetched.padding_id  # type: ignore[assignment]
    else:
        rows, columns = weight.shape
        module = nn.Linear(columns, rows, bias=False, device="meta")
    module.weight = weight
    model.set_submodule(name.removesuffix(".weight"), module)
