"""The optimizer of the recipe, and its state as plain tensors (bitsandbytes' own cannot be resumed when paged).

Why master weights: bf16 has 8 bits of precision, so adding 1e-4 to 1.0 leaves 1.0, and what is learned is lost.
How: a master weight is fp32, and its upper 16 bits, rounded, are the bf16 parameter itself; only the lower 16 are kept
beside it. The optimizer's own update runs on the fp32 value of one parameter at a time, which is then split again:
the arithmetic is that of an fp32 adapter given the same gradients, bit for bit, for 2 bytes a weight instead of 4.
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
from qlora_kit.recipe import Train

_TABLES = ("qmap1", "qmap2")  # constants of bitsandbytes' 8-bit code, rebuilt with the state
_LOWER = "master_lower"  # beside the moments in a parameter's state


def build_optimizer(
    settings: Train, parameters: dict[str, nn.Parameter], device: torch.device, *, master_weights: bool
) -> torch.optim.Optimizer:
    """The recipe's optimizer; its unpaged kin, said once, where the device has no unified memory.

    Args:
        master_weights: keep the lower half of each; the parameters are bf16.
    """
    name = settings.optimizer
    row = OPTIMIZERS[name]
    if row.unpaged is not None and not has_unified_memory(device):
        note(f"{name}: {device.type} has no unified memory to page; {row.unpaged} runs instead, the same arithmetic")
        row = OPTIMIZERS[row.unpaged]
    optimizer = row.build(list(parameters.values()), settings.lr, settings.weight_decay)
    _make_state(optimizer)
    return MasterWeights(optimizer) if master_weights else optimizer


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Make bitsandbytes' state before the first step; torch's own stays lazy.

    Made in the step, it comes to lie between passing fp32 tensors, whose places the heap then keeps as holes: on a CPU
    2 MiB for each block of a 1B model.
    """
    if hasattr(optimizer, "init_state"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
                optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)


# ---------------------------------------------------------------------------------------------- master weights


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as the nearest bf16 (ties away from zero) and the int16 that is lacking; `join` is its inverse.

    As integers, fp32 = bf16 * 2**16 + int16: the int16 is the lower half of the bits read as a signed number, and where
    that is negative the bf16 is one higher, carrying into the exponent as rounding does. `join` gives back every bit
    pattern; the bf16 of a NaN may be a number, but a step that is not finite never gets here (`loop.train_step`).
    Source: Split-SGD-BF16, Kalamkar et al. 2020 (arXiv:2005.04680), which truncates; here the bf16 is rounded.
    """
    bits = master.view(torch.int32)
    upper = ((bits + 0x8000) >> 16).to(torch.int16)
    return upper.view(torch.bfloat16), bits.to(torch.int16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """The fp32 tensor that `split` took apart."""
    return upper.float().view(torch.int32).add_(lower).view(torch.float32)


class MasterWeights(torch.optim.Optimizer):
    """Any optimizer of bf16 parameters, made to step on their fp32 master weights.

    In its turn a parameter's master takes the parameter's place in `inner`, with the same state and settings, so one
    parameter's fp32 value and gradient exist at a time. At the start the lower halves are zero: the master begins at
    the bf16 value, since what rounding took from a random A was never learned, and B is zero.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.state = inner, inner.state
        for parameter, state in self.state.items():
            state[_LOWER] = torch.zeros_like(parameter, dtype=torch.int16)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of `inner` for every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        self.inner.param_groups = self.param_groups  # lets go of the last master

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        master = join(parameter, state[_LOWER]) if state else parameter.float()
        master.grad = parameter.grad.float()  # type: ignore[union-attr]
        self.state[master] = state
        self.inner.param_groups = [group | {"params": [master]}]
        self.inner.step()
        del self.state[master]
        upper, lower = split(master)
        parameter.copy_(upper)
        state[_LOWER] = state[_LOWER].copy_(lower) if _LOWER in state else lower


# ---------------------------------------------------------------------------------------------- saved state


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The state of every parameter: tensors named `<parameter>/<key>`, and plain numbers by parameter.

    The lower halves of master weights are among the tensors; the upper ones are the parameters.
    """
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
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        for key, value in saved.get(name, {}).items():
            if key not in state:
                state[key] = value.to(parameter.device if value.dim() else "cpu")
            elif not isinstance(state[key], Tensor) or state[key].shape != value.shape:
                raise CheckpointError(f"optimizer state {name}/{key}: shape {list(value.shape)} does not fit this run")
            else:
                state[key].copy_(value)
        state.update(numbers.get(name, {}))
