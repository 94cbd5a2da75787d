"""LORA_INITIALISATIONS: how A starts. B is always zero, so that the first step sees exactly the base.

A row fills A, [R rank, I in], from a generator; its name is what the recipe's `adapter.init` says.
Imported by: adapters.inject.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Generator, Tensor


def _gaussian(lora_A: Tensor, generator: Generator) -> None:
    """Standard deviation 1/R: Hu et al. 2021 (arXiv:2106.09685, 4.1) leave it open; this is peft's `gaussian`."""
    lora_A.normal_(0.0, 1.0 / lora_A.shape[0], generator=generator)


def _kaiming(lora_A: Tensor, generator: Generator) -> None:
    """U(-1/sqrt(I), 1/sqrt(I)): torch's `kaiming_uniform_(a=sqrt(5))`, the default of peft and loralib."""
    bound = 1.0 / math.sqrt(lora_A.shape[1])
    lora_A.uniform_(-bound, bound, generator=generator)


LORA_INITIALISATIONS: dict[str, Callable[[Tensor, Generator], None]] = {
    "gaussian": _gaussian,
    "kaiming": _kaiming,
}
