"""Held-out loss, with the chunked loss of training: no logits are kept, so evaluation never needs more memory.

Imported by: training.loop, the `eval` command, export.verify.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qlora_kit.base.loader import Base
from qlora_kit.console import progress
from qlora_kit.errors import NonFiniteError
from qlora_kit.training.loss import batch_losses


@dataclass(frozen=True)
class Evaluation:
    """Mean over learned tokens, in nats."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_json(self) -> dict[str, Any]:
        """For `eval --json`."""
        return asdict(self) | {"perplexity": self.perplexity}


@torch.no_grad()
def evaluate(base: Base, batches: Sequence[Any], chunk_tokens: int, together: int = 1) -> Evaluation:
    """Loss of the base with its active adapters, dropout off; the modes of all modules are as before afterwards.

    Args:
        together: batches that pass each block together, so that one which is away is fetched once for them.
    Raises: NonFiniteError: the loss is NaN or infinite.
    """
    modes = [(module, module.training) for module in base.model.modules() if module.training]
    base.model.eval()
    total, tokens = 0.0, 0
    try:
        with progress("evaluating", len(batches)) as advance:
            for start in range(0, len(batches), together):
                group = batches[start : start + together]
                total += sum(loss.item() for loss in batch_losses(base, group, chunk_tokens))
                tokens += sum(batch.learned_tokens for batch in group)
                advance(len(group), "")
    finally:
        for module, mode in modes:
            module.training = mode
    if not math.isfinite(total):
        raise NonFiniteError(f"held-out loss is {total}: the model or the adapter produces NaN or infinity")
    return Evaluation(total / max(1, tokens), tokens)
