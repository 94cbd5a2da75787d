"""Blocks that are alike, simulated once: stand-ins that leave behind what the block would, for most of a deep model.

Why: of a 70B's 80 blocks nearly all do the same, and to run each one's operators is what a simulated step takes time
for. How: of recomputed blocks of one kind of attention the first two and the last two
run; in the others a stand-in takes the place of transformers' block. All around it stays: the weights are fetched into
their slots, the input is kept and taken back, a gradient is made for every trained tensor.
Why that is exact: between two blocks the memory in use grows or shrinks by the same bytes a block (an input; the
gradients of the trained tensors, which must be of the same shapes in all blocks), so over blocks of one kind it is
highest at an end. Blocks that keep their activations all run. Races within a stand-in are not looked for.
Imported by: simulate.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.loader import Base
from qlora_kit.training.blocks import BlockRunner

AT_EACH_END = 2  # blocks of a kind that run: the first and last of all differ from their neighbours


class _Passed(torch.autograd.Function):
    """[B, T, D] -> an output of that shape; backward makes the gradients of input and parameters, without values."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (torch.empty_like(grad), *map(torch.empty_like, ctx.parameters))


class _StandIn:
    """Takes the place of a block's own forward."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _Passed.apply(hidden, *self.parameters)


def pass_alike_blocks(base: Base) -> int:
    """Put stand-ins into recomputed blocks between the first two and the last two of their kind.

    Args:
        base: with a `BlockRunner` before every block, its adapter injected.
    Returns: how many blocks are passed; none where the trained tensors differ from block to block.
    """
    runners: list[Any] = [block.forward for block in base.blocks()]
    if len({tuple(parameter.shape for parameter in runner.parameters()) for runner in runners}) > 1:
        return 0
    attention = getattr(base.model.config, "layer_types", None) or [None] * len(runners)
    kinds: defaultdict[str | None, list[BlockRunner]] = defaultdict(list)
    for runner, attends in zip(runners, attention, strict=True):
        if runner.recomputes:
            kinds[attends].append(runner)
    passed = [runner for alike in kinds.values() for runner in alike[AT_EACH_END:-AT_EACH_END]]
    for runner in passed:
        runner.plain_forward = _StandIn(runner.parameters())
    return len(passed)
