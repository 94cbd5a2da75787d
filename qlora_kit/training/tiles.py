"""Modules that treat each token alone, run over tiles of the sequence and again in backward: MLPs and RMS norms.

Why: one block's backward is what is left of activation memory when blocks are recomputed, and most of it is the MLP's
width and the norms' fp32 copies. How: backward takes one tile of tokens at a time, so that of these only a tile exists.
It costs no product: of a recomputed block the MLP's output is not needed, so its forward is left to its backward.
The trained matrices' gradients are summed over tiles in fp32 and rounded once, whether a tile was kept or is run again,
so the bits depend on the tile's size and on nothing else.
Source of the idea: tiled MLP of Arctic Long Sequence Training (arXiv:2506.13996). Imported by: training.blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.adapters.lora import DropoutSeed
from qlora_kit.base.linear import FrozenLinear


class TokenWise:
    """Stands in the `forward` of a module that maps [B, T, D] to [B, T, D], each token alone.

    Args:
        tile_tokens: positions of a tile; 0: all.
        recomputes: run again in backward; otherwise the graph of each tile is kept.
        dropout_seed: of the adapter.
        last: the linear that makes the module's output, where that output may be left out.
    """

    def __init__(
        self,
        module: nn.Module,
        tile_tokens: int,
        recomputes: bool,
        dropout_seed: DropoutSeed,
        last: FrozenLinear | None = None,
    ) -> None:
        self.module, self.plain_forward, self.last = module, module.forward, last
        self.tile_tokens, self.recomputes, self.dropout_seed = tile_tokens, recomputes, dropout_seed

    def __call__(self, x: Tensor) -> Tensor:
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        single = len(self.tiles(x)) == 1
        if not torch.is_grad_enabled() or not (x.requires_grad or parameters):
            return self.plain_forward(x) if single else self.run(x)
        if single and (self.last is not None or not self.recomputes):
            return self.plain_forward(x)  # of a single tile nothing is left when its backward begins
        return _RunTiles.apply(self, x, *parameters)

    def tiles(self, x: Tensor) -> tuple[Tensor, ...]:
        """Views of x, tile after tile."""
        return x.split(self.tile_tokens or x.shape[1], dim=1)

    def run(self, x: Tensor) -> Tensor:
        """The module's output, one tile at a time."""
        whole = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for index, (tile, target) in enumerate(zip(self.tiles(x), self.tiles(whole))):
            with self._dropout_of(index):
                target.copy_(self.plain_forward(tile))
        return whole

    def graph_of(self, index: int, tile: Tensor, *, output_unused: bool) -> tuple[Tensor, Tensor]:
        """(tile, output) with a graph between them."""
        tile = tile.detach().requires_grad_()
        before = self.last is not None and self.last.output_unused
        if self.last is not None:
            self.last.output_unused = output_unused
        try:
            with torch.enable_grad(), self._dropout_of(index):
                return tile, self.plain_forward(tile)
        finally:
            if self.last is not None:
                self.last.output_unused = before

    @contextlib.contextmanager
    def _dropout_of(self, index: int) -> Iterator[None]:
        """Masks of its own for each tile; those of the first are the masks of a sequence that is one tile."""
        key = self.dropout_seed.key
        self.dropout_seed.key = (*key, index) if index else key
        try:
            yield
        finally:
            self.dropout_seed.key = key


class _RunTiles(torch.autograd.Function):
    """x -> module(x); then the module's parameters, for the graph to see."""

    @staticmethod
    def forward(ctx: Any, runner: TokenWise, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.runner, ctx.parameters, ctx.graphs = runner, parameters, None
        if runner.recomputes:
            ctx.save_for_backward(x)
            if runner.last is not None and runner.last.output_unused:
                return x.new_zeros(()).expand_as(x)
            return runner.run(x)
        ctx.graphs = [runner.graph_of(i, tile, output_unused=False) for i, tile in enumerate(runner.tiles(x))]
        return torch.cat([output.detach() for _, output in ctx.graphs], dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        runner, parameters = ctx.runner, ctx.parameters
        grad_x = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        sums: list[Tensor | None] = [None] * len(parameters)
        kept = list(runner.tiles(ctx.saved_tensors[0]) if ctx.graphs is None else ctx.graphs)
        recomputes, ctx.graphs = ctx.graphs is None, None
        for index, (grad_tile, target) in enumerate(zip(runner.tiles(grad), runner.tiles(grad_x))):
            graph: Any = kept.pop(0)
            tile, output = runner.graph_of(index, graph, output_unused=True) if recomputes else graph
            found = torch.autograd.grad(output, [tile, *parameters], grad_tile, allow_unused=True)
            del graph, tile, output
            target.copy_(found[0])
            for number, part in enumerate(found[1:]):
                if part is not None:
                    total = sums[number]
                    sums[number] = part.float() if total is None else total.add_(part)
        rounded = [None if total is None else total.to(p.dtype) for total, p in zip(sums, parameters)]
        return (None, grad_x, *rounded)
