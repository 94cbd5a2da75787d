"""An adapter of a smaller rank: each update replaced by the nearest one of fewer singular values (Eckart, Young 1936).

A linear whose rank already suffices keeps its pair bit for bit. Alpha is one for all that are cut, since not every
server reads `alpha_pattern`. Imported by: adapter_command.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_kit.adapters.factors import (
    joined,
    nearest,
    norm,
    open_adapter,
    require_plain,
    save_branches,
    scaled,
    singular_values,
)
from qlora_kit.adapters.inspect import energy_rank
from qlora_kit.files import require_new


@dataclass(frozen=True)
class Cut:
    """What resizing did to one linear.

    Attributes:
        norm: of the update before; error: of what is stored now less that; both Frobenius.
    """

    linear: str
    rank_before: int
    rank: int
    norm: float
    error: float

    @property
    def relative_error(self) -> float:
        return self.error / self.norm if self.norm else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"relative_error": self.relative_error}


def resize(folder: Path, out: Path, *, rank: int | None = None, energy: float = 1.0) -> list[Cut]:
    """Write the adapter with at most `rank` a linear, or as many as hold `energy` of the squared singular values.

    Raises: ModelError: no adapter there, or more than LoRA. DiskError: `out` exists, or the disk refuses.
    """
    require_new(out)
    adapter = open_adapter(folder)
    require_plain(adapter, "resize")
    alpha = max(before for before, *_ in adapter.shapes.values())
    branches, cuts = {}, []
    for linear, (before, *_) in adapter.shapes.items():
        branch = adapter.branch(linear)
        sigma = singular_values(scaled(branch))
        wanted = rank or max(1, energy_rank(sigma, energy))
        branches[linear], error = branch, 0.0
        if wanted < before:
            branches[linear] = nearest(scaled(branch), wanted, alpha, branch.lora_A.dtype, branch.dropout)
            error = norm(joined([scaled(branches[linear]), scaled(branch, -1.0)]))
        length = float(torch.linalg.vector_norm(sigma))
        cuts.append(Cut(linear, before, branches[linear].lora_A.shape[0], length, error))
    save_branches(out, branches, [adapter])
    return cuts


def total(cuts: list[Cut], linear: str = "all") -> Cut:
    """Several linears as one: all of a layer, or of the model."""
    length, error = (sum(x * x for x in column) ** 0.5 for column in zip(*((cut.norm, cut.error) for cut in cuts)))
    return Cut(linear, max(cut.rank_before for cut in cuts), max(cut.rank for cut in cuts), length, error)
