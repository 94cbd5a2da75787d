"""A frozen linear of the base with room for LoRA branches beside it: y = x W^T + b + s (x A^T) B^T.

Why one autograd function: it keeps x once (not at all without a branch), never the dequantized weight, and takes W
again from its handle, the module, in backward; so W may be stored in 4 bits, or be elsewhere in between.
How: W comes from `FrozenLinear.weight()`; the branch is added in place with `addmm`, in the dtype of x.
Shapes: N tokens, I in, O out, R rank (the sum of the ranks when several adapters are active).
Imported by: base.loader (builds it), adapters (hangs branches in), export (reads weights).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.base import nf4
from qlora_kit.base.workspace import Workspace


class Branch(Protocol):
    """What the product needs of a LoRA branch: `adapters.lora.LoRABranch`."""

    lora_A: nn.Parameter  # [R, I]
    lora_B: nn.Parameter  # [O, R]
    scale: float

    def dropout(self) -> Dropout | None: ...

    def gain(self, weight: Callable[[], Tensor]) -> Tensor | None: ...


class Dropout:
    """Dropout as a pure function of a seed, so that no mask is stored and a step can be repeated exactly."""

    def __init__(self, probability: float, seed: int) -> None:
        self.probability, self.seed = probability, seed

    def __call__(self, x: Tensor) -> Tensor:
        """x with each value kept and scaled by 1 / (1 - p), or zero; the same call gives the same mask."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        keep = 1.0 - self.probability
        mask = torch.empty_like(x).bernoulli_(keep, generator=generator)
        return mask.mul_(x).div_(keep)


class FrozenLinear(nn.Module):
    """One linear of the base, its weight in 4 bits or dense, with LoRA branches by adapter name.

    Attributes:
        branches: every adapter that has a branch here.
        active: names of the adapters that take part in the product, in order.
        rows: the adapter of each row of the batch (None: no adapter), instead of `active`; see `inject.per_row`.
        merged: W + the update of the active adapters, when merged in place; else None.
        held: W dequantized once and kept, where memory allows it; else None.
        workspace: what W is dequantized into for a product; None: into a new tensor.
        output_unused: the caller is about to run forward only for what backward needs of it, so there is no product.
    """

    bias: Tensor | None
    dense: Tensor
    codes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        quantization: str,
        double_quant: bool,
        dtype: torch.dtype,
        block: int = nf4.BLOCK,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.quantization, self.dtype, self.block = quantization, dtype, block
        self.branches = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.rows: tuple[str | None, ...] | None = None
        self.merged: Tensor | None = None
        self.held: Tensor | None = None
        self.workspace: Workspace | None = None
        self.output_unused = False
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"dense": ((out_features, in_features), dtype)}
        if quantization != "none":
            shapes = nf4.state_shapes(in_features * out_features, double_quant, block)
        self.stored = tuple(shapes)
        for name, (shape, stored_dtype) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=stored_dtype, device="meta"))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device="meta") if bias else None)

    def store(self, weight: Tensor) -> None:
        """Take the weight, [O, I] on the device where it is to live, quantizing it if this linear is quantized."""
        stored = {"dense": weight.to(self.dtype)}
        if self.quantization != "none":
            stored = nf4.quantize(weight.to(self.dtype), self.quantization, "absmax_offset" in self.stored)
        self.take(stored)

    def take(self, stored: Mapping[str, Tensor]) -> None:
        """Take the stored tensors as they are, by `nf4`'s names (or `dense`), on the device where they are to live."""
        for name, value in stored.items():
            self.register_buffer(name, value)
        self.stored = tuple(stored)

    @property
    def dense_bytes(self) -> int:
        """Bytes of W in the dtype of computation, if that has to be made; else 0."""
        return 0 if self.quantization == "none" else self.out_features * self.in_features * self.dtype.itemsize

    def base_weight(self, out: Tensor | None = None) -> Tensor:
        """W as the base has it, [O, I]: dequantized into `out` or anew, or the kept tensor (do not write to it)."""
        if self.quantization == "none":
            return self.dense
        if self.held is not None:
            return self.held
        stored = {name: getattr(self, name) for name in self.stored}
        shape = (self.out_features, self.in_features)
        return nf4.dequantize(stored, shape, self.quantization, self.dtype, block=self.block, out=out)

    def weight(self) -> Tensor:
        """W as the product uses it, the merged weight if there is one; good until another linear's is asked for."""
        if self.merged is not None:
            return self.merged
        if self.workspace is None or self.held is not None or not self.dense_bytes:
            return self.base_weight()
        shape, device = (self.out_features, self.in_features), self.codes.device
        return self.workspace.weight(self, shape, self.dtype, device, self.base_weight)

    def active_branches(self) -> list[Branch]:
        """The branches that take part in the product."""
        if self.merged is not None:
            return []
        return [self.branches[name] for name in self.active if name in self.branches]  # type: ignore[misc]

    def merge(self) -> None:
        """Put the active adapters' update into a dense copy of the weight: fp32 arithmetic, rounded once."""
        branches = self.active_branches()
        if not branches:
            return
        weight = self.base_weight().to(torch.float32, copy=True)
        for branch in branches:
            weight.addmm_(branch.lora_B.detach().float(), branch.lora_A.detach().float(), alpha=branch.scale)
            if (gain := branch.gain(self.base_weight)) is not None:
                weight.mul_(gain[:, None])
        self.merged = weight.to(self.dtype)

    def unmerge(self) -> None:
        """Undo `merge`, exactly: the base's own weight was never touched."""
        self.merged = None

    def forward(self, x: Tensor) -> Tensor:
        """y [..., O] of x [..., I]."""
        if self.rows is not None:
            return self._forward_by_row(x, self.rows)
        branches = self.active_branches()
        if not branches:
            return _FrozenLinear.apply(x, None, None, self, 1.0, None)
        if len(branches) == 1:
            (branch,) = branches
            y = _FrozenLinear.apply(x, branch.lora_A, branch.lora_B, self, branch.scale, branch.dropout())
            gain = branch.gain(self.base_weight)
            return y if gain is None else self._with_gain(y, gain)
        # Several adapters are one of the sum of their ranks: s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2].
        lora_A = torch.cat([branch.lora_A.to(x.dtype) for branch in branches])
        lora_B = torch.cat([branch.lora_B.to(x.dtype) * branch.scale for branch in branches], dim=1)
        return _FrozenLinear.apply(x, lora_A, lora_B, self, 1.0, None)

    def _forward_by_row(self, x: Tensor, rows: tuple[str | None, ...]) -> Tensor:
        """y [B, ..., O] of x [B, ..., I], without gradients: one product with W for all rows, and one with A and B for
        each run of rows that have the same adapter.

        Raises: ValueError: `rows` does not name an adapter for each row of x.
        """
        if len(x) != len(rows):
            raise ValueError(f"a batch of {len(rows)} rows was promised, this one has {len(x)}")
        y = F.linear(x, self.weight(), self.bias)
        stop = 0
        for name, run in itertools.groupby(rows):
            start, stop = stop, stop + len(list(run))
            if name is not None and name in self.branches:
                self._add_branch(y[start:stop], x[start:stop], self.branches[name])  # type: ignore[arg-type]
        return y

    def _add_branch(self, y: Tensor, x: Tensor, branch: Branch) -> None:
        """Change y [..., O] of the plain base into y with a branch, in place."""
        hidden_NR = F.linear(x.flatten(0, -2), branch.lora_A.to(x.dtype))
        y.view(-1, self.out_features).addmm_(hidden_NR, branch.lora_B.to(x.dtype).t(), alpha=branch.scale)
        if (gain := branch.gain(self.base_weight)) is not None:
            y.copy_(self._with_gain(y, gain))

    def _with_gain(self, y: Tensor, gain: Tensor) -> Tensor:
        """y [..., O] with all but the bias multiplied by `gain` [O] (DoRA); arithmetic in fp32."""
        unscaled = 0.0 if self.bias is None else self.bias * (1 - gain)
        return (y * gain + unscaled).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.quantization}, active={list(self.active)}"


def frozen_linears(module: nn.Module) -> list[FrozenLinear]:
    """The frozen linears below a module, in its order."""
    return [found for found in module.modules() if isinstance(found, FrozenLinear)]


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b + s (drop(x) A^T) B^T; gradients of x, A and B, none of W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        linear: FrozenLinear,
        scale: float,
        dropout: Dropout | None,
    ) -> Tensor:
        ctx.linear, ctx.scale, ctx.dropout = linear, scale, dropout
        if linear.output_unused:
            y = x.new_zeros(()).expand(*x.shape[:-1], linear.out_features)
        else:
            y = F.linear(x, linear.weight(), linear.bias)
        if lora_A is None or lora_B is None:
            return y
        dropped = x if dropout is None else dropout(x)
        hidden_NR = F.linear(dropped.reshape(-1, x.shape[-1]), lora_A.to(x.dtype))
        if not linear.output_unused:
            y.view(-1, y.shape[-1]).addmm_(hidden_NR, lora_B.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, lora_A, lora_B, hidden_NR)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_NO @ ctx.linear.weight()
        if ctx.saved_tensors:
            x, lora_A, lora_B, hidden_NR = ctx.saved_tensors
            grad_hidden_NR = (grad_NO @ lora_B.to(grad.dtype)).mul_(ctx.scale)
            dropped = x if ctx.dropout is None else ctx.dropout(x)
            grad_A = (grad_hidden_NR.t() @ dropped.reshape(-1, x.shape[-1])).to(lora_A.dtype)
            grad_B = (grad_NO.t() @ hidden_NR).mul_(ctx.scale).to(lora_B.dtype)
            if grad_x is not None and ctx.dropout is None:
                grad_x.addmm_(grad_hidden_NR, lora_A.to(grad.dtype))
            elif grad_x is not None:
                grad_x += ctx.dropout((grad_hidden_NR @ lora_A.to(grad.dtype)).view_as(x)).view_as(grad_x)
        if grad_x is not None:
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        return grad_x, grad_A, grad_B, None, None, None
