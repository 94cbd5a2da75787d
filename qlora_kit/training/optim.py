"""The optimizer of the recipe, and its state as plain tensors (bitsandbytes' own cannot be resumed when paged).

Imported by: training.loop, training.checkpoint.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.device import has_unified_memory
from qlora_kit.console import note
from qlora_kit.errors import CheckpointError
from qlora_kit.optimizers import OPTIMIZERS

_TABLES = ("qmap1", "qmap2")  # constants of bitsandbytes' 8-bit code, rebuilt with the state


def build_optimizer(
    name: str, parameters: dict[str, nn.Parameter], device: torch.device, *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer `name` of OPTIMIZERS; its unpaged kin, said once, where the device has no unified memory."""
    row = OPTIMIZERS[name]
    if row.unpaged is not None and not has_unified_memory(device):
        note(f"{name}: {device.type} has no unified memory to page; {row.unpaged} runs instead, the same arithmetic")
        row = OPTIMIZERS[row.unpaged]
    return row.build(list(parameters.values()), lr, weight_decay)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The state of every parameter: tensors named `<parameter>/<key>`, and plain numbers by parameter."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key in _TABLES:
                continue
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def restore_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
    numbers: dict[str, dict[str, Any]],
) -> None:
    """Put back what `optimizer_state` gave: into bitsandbytes' own buffers (paged ones too), or as torch's state.

    Raises: CheckpointError: a tensor is missing or has another shape.
    """
    saved: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        saved.setdefault(parameter_name, {})[key] = value
    for position, (name, parameter) in enumerate(parameters.items()):
        if name not in saved:
            continue
        if hasattr(optimizer, "init_state"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.init_state(optimizer.param_groups[0], parameter, 0, position)
        state = optimizer.state[parameter]
        for key, value in saved[name].items():
            if key not in state:
                state[key] = value.to(parameter.device if value.dim() else "cpu")
            elif not isinstance(state[key], Tensor) or state[key].shape != value.shape:
                raise CheckpointError(f"optimizer state {name}/{key}: shape {list(value.shape)} does not fit this run")
            else:
                state[key].copy_(value)
        state.update(numbers.get(name, {}))
