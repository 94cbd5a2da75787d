"""OPTIMIZERS: what each optimizer costs per trained parameter, and how it is built.

Planner and trainer read the same row, so they cannot drift apart. Facts need no torch; `build` imports it when called.
Paged optimizers keep their state in CUDA's unified memory. Elsewhere there is none, so the unpaged kin runs instead:
the same arithmetic, the same state, and `unpaged` names it. Imported by recipe, planning and training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EIGHT_BIT_BLOCK = 256  # values that share one fp32 scale in bitsandbytes' 8-bit state
EIGHT_BIT_MINIMUM = 4096  # bitsandbytes keeps smaller parameters in 32-bit state


@dataclass(frozen=True)
class Optimizer:
    """One row.

    Attributes:
        state_bits: 8 or 32, of each of the two moments.
        in_dtype: the moments take the parameter's dtype instead, where that is smaller than fp32.
        unpaged: name of the same optimizer without paging, for devices without unified memory; None: it is not paged.
        build: (parameters, lr, weight_decay) -> torch.optim.Optimizer.
    """

    state_bits: int
    unpaged: str | None
    build: Callable[..., Any]
    in_dtype: bool = False

    def state_bytes(self, parameter_count: int, dtype_bytes: int = 4) -> int:
        """Bytes of both moments of one tensor of `parameter_count` values, quantization maps not counted.

        Args:
            dtype_bytes: of a value as the optimizer sees it: of its master weight if there is one.
        """
        if self.state_bits == 32 or parameter_count < EIGHT_BIT_MINIMUM:
            return 2 * (dtype_bytes if self.in_dtype else 4) * parameter_count
        return 2 * parameter_count + 2 * 4 * -(-parameter_count // EIGHT_BIT_BLOCK)


def _bitsandbytes(class_name: str) -> Callable[..., Any]:
    def build(parameters: Any, lr: float, weight_decay: float) -> Any:
        import bitsandbytes.optim

        return getattr(bitsandbytes.optim, class_name)(parameters, lr=lr, weight_decay=weight_decay)

    return build


def _torch_adamw(parameters: Any, lr: float, weight_decay: float) -> Any:
    import torch

    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


OPTIMIZERS: dict[str, Optimizer] = {
    "paged_adamw_8bit": Optimizer(8, "adamw_8bit", _bitsandbytes("PagedAdamW8bit")),
    "paged_adamw_32bit": Optimizer(32, "adamw_32bit", _bitsandbytes("PagedAdamW32bit")),
    "adamw_8bit": Optimizer(8, None, _bitsandbytes("AdamW8bit")),
    "adamw_32bit": Optimizer(32, None, _bitsandbytes("AdamW32bit")),
    "adamw": Optimizer(32, None, _torch_adamw, in_dtype=True),
}
