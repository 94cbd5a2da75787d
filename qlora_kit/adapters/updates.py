"""What an adapter makes of one tensor of the base, as its files say it: the arithmetic of running and merging alike.

How: `StoredBranch` is LoRA (or DoRA) on a matrix [O, I]; `TensorUpdate` is all that may happen to a tensor outside the
linears of the blocks (embedding, head, norms) and to a bias: other values, some other rows, a branch on top. Both
take the base's tensor in fp32 or fp64, or rows of it. `StoredAdapter` is the whole adapter by the model's names.
Source: Hu et al. 2021, arXiv:2106.09685; DoRA: Liu et al. 2024, arXiv:2402.09353, eq. 5 (each row of W + s B A has a
learned norm, in PEFT's layout the rows [O]). Imported by: adapters, export.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredBranch:
    """One branch as the file holds it, on the host."""

    lora_A: Tensor  # [R, I]
    lora_B: Tensor  # [O, R]
    scale: float
    dropout: float
    magnitude: Tensor | None = None  # [O], of DoRA

    def rows(self, start: int, stop: int) -> StoredBranch:
        """The branch of the rows from `start` to before `stop` alone."""
        magnitude = None if self.magnitude is None else self.magnitude[start:stop]
        return replace(self, lora_B=self.lora_B[start:stop], magnitude=magnitude)

    def apply(self, weight: Tensor) -> Tensor:
        """What the adapter makes of `weight` [O, I], the base's in fp32 or fp64, which is overwritten."""
        weight.addmm_(self.lora_B.to(weight), self.lora_A.to(weight), alpha=self.scale)
        return weight if self.magnitude is None else weight.mul_(gain(weight, self.magnitude)[:, None])


def gain(updated: Tensor, magnitude: Tensor) -> Tensor:
    """What DoRA multiplies each row of W + s B A with, [O] in fp32: its magnitude over its norm."""
    return magnitude.to(updated) / torch.linalg.vector_norm(updated, dim=1)


@dataclass(frozen=True)
class TensorUpdate:
    """What becomes of one tensor, in this order.

    Attributes:
        value: stands in the base's place; an embedding or head may have more rows (added tokens).
        listed: ids of rows that have other values, and these, [n, D].
        branch: LoRA on the [V, D] of embedding or head; for the former A and B are those of W, not of its transpose.
    """

    value: Tensor | None = None
    listed: tuple[Tensor, Tensor] | None = None
    branch: StoredBranch | None = None

    def rows(self, start: int, stop: int) -> TensorUpdate:
        """The update of the rows from `start` to before `stop` alone."""
        value = None if self.value is None else self.value[start:stop]
        branch = None if self.branch is None else self.branch.rows(start, stop)
        if self.listed is None:
            return TensorUpdate(value, None, branch)
        ids, values = self.listed
        here = (ids >= start) & (ids < stop)
        return TensorUpdate(value, (ids[here] - start, values[here]), branch)

    def apply(self, base: Tensor) -> Tensor:
        """What the adapter makes of a tensor of the base in fp32 or fp64, which is overwritten."""
        new = base if self.value is None else self.value.to(base, copy=True)
        if self.listed is not None:
            ids, values = self.listed
            new.index_copy_(0, ids.to(new.device), values.to(new))
        return new if self.branch is None else self.branch.apply(new)

    def height(self, rows: int) -> int:
        """Rows of the result, of a tensor with so many."""
        return rows if self.value is None else len(self.value)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter by the names of the model.

    Attributes:
        branches: by linear of the blocks.
        tensors: by name of a tensor that is no weight of such a linear (`lm_head.weight`, also of a tied model).
    """

    branches: dict[str, StoredBranch]
    tensors: dict[str, TensorUpdate]

    def update(self, name: str) -> StoredBranch | TensorUpdate | None:
        """What becomes of a tensor of the model; None: it stays. A linear's is of [O, I], however files store it."""
        return self.branches.get(name.removesuffix(".weight")) or self.tensors.get(name)

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but LoRA on the linears of the blocks."""
        return not self.tensors and all(branch.magnitude is None for branch in self.branches.values())
