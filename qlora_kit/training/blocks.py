"""A decoder block whose forward is recomputed in backward, so that only its input is kept.

Why one autograd function of our own: at this boundary the block's frozen weights are also brought in and let go again,
and nothing of the base is ever on the autograd graph. Dropout comes from seeds, so no RNG state is kept.
Source: Chen et al. 2016, arXiv:1604.06174. Imported by: training.loop, the commands.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.loader import Base
from qlora_kit.base.streaming import BlockStreamer


class _RunBlock(torch.autograd.Function):
    """hidden -> block(hidden); keeps hidden only. `parameters` are what the block trains, for the graph to see."""

    @staticmethod
    def forward(
        ctx: Any, call: Callable[[Tensor], Tensor], runner: BlockRunner, hidden: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.call, ctx.runner, ctx.parameters = call, runner, parameters
        ctx.save_for_backward(hidden)
        with torch.no_grad(), runner.weights(runner.index + 1):
            return call(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[2])
        inputs = [hidden, *ctx.parameters] if hidden.requires_grad else list(ctx.parameters)
        with ctx.runner.weights(ctx.runner.index - 1):
            with torch.enable_grad():
                output = ctx.call(hidden)
            grads = torch.autograd.grad(output, inputs, grad, allow_unused=True)
        return (None, None, *grads) if hidden.requires_grad else (None, None, None, *grads)


class BlockRunner:
    """Stands in a block's `forward`; transformers' own loop calls it with whatever its architecture passes.

    Args:
        index, blocks: which block of how many.
        weights: (following) -> context in which the block's weights are there, `following` being the block that will
            run next; where all weights live on the device it does nothing.
    """

    def __init__(
        self, block: nn.Module, index: int, blocks: int, weights: Callable[[int], AbstractContextManager[None]]
    ) -> None:
        self.block, self.plain_forward, self.weights = block, block.forward, weights
        self.index, self.blocks = index, blocks

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        parameters = [parameter for parameter in self.block.parameters() if parameter.requires_grad]
        if not torch.is_grad_enabled() or not (parameters or hidden.requires_grad):
            with self.weights((self.index + 1) % self.blocks):  # the next forward begins at block 0
                return self.plain_forward(hidden, *args, **kwargs)
        is_tuple = False

        def call(x: Tensor) -> Tensor:
            nonlocal is_tuple
            output = self.plain_forward(x, *args, **kwargs)
            is_tuple = isinstance(output, tuple)
            return output[0] if is_tuple else output

        output = _RunBlock.apply(call, self, hidden, *parameters)
        return (output,) if is_tuple else output


def attach(base: Base, recompute: bool) -> None:
    """Put a `BlockRunner` before every block, to recompute it in backward and to bring in weights that are away.

    Blocks that are away are always recomputed: their weights are gone when backward comes.
    """
    for index, block in enumerate(base.blocks()):
        if isinstance(block.__dict__.get("forward"), BlockRunner):
            del block.forward
        if recompute or base.streamer is not None:
            block.forward = BlockRunner(
                block, index, len(base.blocks()), functools.partial(_weights, base.streamer, index)
            )


def _weights(streamer: BlockStreamer | None, index: int, following: int) -> AbstractContextManager[None]:
    return contextlib.nullcontext() if streamer is None else streamer.block(index, following)
