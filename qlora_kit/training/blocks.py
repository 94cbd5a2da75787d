"""`run_block`: a decoder block whose forward is recomputed in backward, so that only its input is kept.

Why one autograd function of our own: at this boundary a block's frozen weights can also be brought in and let go
again, and nothing of the base is ever on the autograd graph. Dropout comes from seeds, so no RNG state is kept.
Source: Chen et al. 2016, arXiv:1604.06174. Imported by: training.loop, generation through `attach`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.loader import Base


class _RunBlock(torch.autograd.Function):
    """hidden -> block(hidden); keeps hidden only. `parameters` are what the block trains, for the graph to see."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[Tensor], Tensor], hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.call, ctx.parameters = call, parameters
        ctx.save_for_backward(hidden)
        with torch.no_grad():
            return call(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[1])
        with torch.enable_grad():
            output = ctx.call(hidden)
        inputs = [hidden, *ctx.parameters] if hidden.requires_grad else list(ctx.parameters)
        grads = torch.autograd.grad(output, inputs, grad, allow_unused=True)
        return (None, *grads) if hidden.requires_grad else (None, None, *grads)


class BlockRunner:
    """Stands in a block's `forward`; transformers' own loop calls it with whatever its architecture passes."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.plain_forward = block, block.forward

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        parameters = [parameter for parameter in self.block.parameters() if parameter.requires_grad]
        if not torch.is_grad_enabled() or not (parameters or hidden.requires_grad):
            return self.plain_forward(hidden, *args, **kwargs)
        is_tuple = False

        def call(x: Tensor) -> Tensor:
            nonlocal is_tuple
            output = self.plain_forward(x, *args, **kwargs)
            is_tuple = isinstance(output, tuple)
            return output[0] if is_tuple else output

        output = _RunBlock.apply(call, hidden, *parameters)
        return (output,) if is_tuple else output


def checkpoint_blocks(base: Base, enabled: bool) -> None:
    """Recompute every decoder block in backward, or stop doing so."""
    for block in base.blocks():
        if isinstance(block.__dict__.get("forward"), BlockRunner):
            del block.forward
        if enabled:
            block.forward = BlockRunner(block)
