"""One LoRA branch: the matrices A and B, their scale and their dropout. The product itself is `base.linear`'s.

Source: Hu et al. 2021, arXiv:2106.09685: h = W0 x + (alpha / r) B A x, A random, B zero. A DoRA branch (Liu et al.
2024, arXiv:2402.09353) also holds the norms of the rows of W0 + (alpha / r) B A.
Imported by: adapters.inject, adapters.store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from qlora_kit.adapters.updates import gain
from qlora_kit.base.linear import Dropout


def mixed_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on `key` and on nothing else."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class DropoutSeed:
    """What the dropout of all branches is drawn from: (seed, step, micro-batch), set by the training loop."""

    def __init__(self) -> None:
        self.key: tuple[int, ...] = (0,)


class LoRABranch(nn.Module):
    """A [R, I] and B [O, R] beside one frozen linear.

    Args:
        scale: alpha / rank.
        dropout_probability: on the branch's input, in training mode only.
        dropout_seed: shared by all branches of a model.
        index: of the branch in the model, so that no two drop the same positions.
        magnitude: [O], the norms that DoRA gives the rows of W + s B A; such a branch is run, never trained.
    """

    magnitude: torch.Tensor | None

    def __init__(
        self,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        *,
        scale: float,
        dropout_probability: float = 0.0,
        dropout_seed: DropoutSeed | None = None,
        index: int = 0,
        magnitude: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("magnitude", magnitude)
        self._gain: torch.Tensor | None = None
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.scale, self.dropout_probability, self.index = scale, dropout_probability, index
        self.dropout_seed = dropout_seed or DropoutSeed()

    def dropout(self) -> Dropout | None:
        """The dropout of this call, or None where nothing is dropped."""
        if not self.training or self.dropout_probability == 0.0:
            return None
        return Dropout(self.dropout_probability, mixed_seed(*self.dropout_seed.key, self.index))

    def gain(self, weight: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """What DoRA multiplies each output with, [O] in fp32; None: plain LoRA.

        Args:
            weight: gives W0; asked for at the first call only, since nothing changes while a branch is run.
        """
        if self.magnitude is not None and self._gain is None:
            updated = weight().to(torch.float32, copy=True)
            updated.addmm_(self.lora_B.detach().float(), self.lora_A.detach().float(), alpha=self.scale)
            self._gain = gain(updated, self.magnitude)
        return self._gain

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[0]}, scale={self.scale}, dropout={self.dropout_probability}"
