"""The passage of micro-batches through the decoder blocks, and back: what is kept, what is recomputed, in which order.

A block is the unit of memory. Forward keeps only its input; backward runs it again. At the same boundary the block's
frozen weights are brought in and let go again, so nothing of the base is ever on the autograd graph.
How: `_RunBlock`, one autograd function, takes several micro-batches at once. All of them pass block k before any passes
block k + 1, forward and backward, so that a block is fetched and dequantized once for them (block-major order).
Gradients go into `.grad` micro-batch by micro-batch, in order: the bits do not depend on how many pass together.
What makes recomputation cheaper than a forward: the block's output is not needed, so neither is its last product.
Dropout comes from seeds, so no RNG state is kept; nothing here runs under autocast.
Source of recomputation: Chen et al. 2016, arXiv:1604.06174. Imported by: training.loop, training.loss, the commands.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.adapters.lora import DropoutSeed
from qlora_kit.base.linear import frozen_linears
from qlora_kit.base.loader import Base
from qlora_kit.base.owners import hand_over, mark
from qlora_kit.base.workspace import Workspace
from qlora_kit.planning.components import aligned
from qlora_kit.training.offload import InputStore, input_store
from qlora_kit.training.tiles import TokenWise


@dataclass(frozen=True)
class Call:
    """What transformers passes to one block besides the hidden state, and the dropout of that micro-batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dropout_key: tuple[int, ...]


class _RunBlock(torch.autograd.Function):
    """Hidden states of G micro-batches -> the block's outputs; then the block's parameters, for the graph to see."""

    @staticmethod
    def forward(ctx: Any, runner: BlockRunner, calls: Sequence[Call], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.runner, ctx.calls, ctx.with_input, ctx.kept = runner, calls, ctx.needs_input_grad[2], _Kept()
        runner.latest, outputs = weakref.ref(ctx.kept), []
        mark("forward", runner.index)
        with runner.weights(runner.index + 1, reused=len(calls) > 1):
            for hidden, call in zip(tensors, calls):
                output, kept = runner.run_and_keep(hidden, call, ctx.with_input)
                outputs.append(output)
                ctx.kept.append(kept)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        runner, parameters, grad_inputs = ctx.runner, ctx.runner.parameters(), []
        mark("backward", runner.index)
        with runner.weights(runner.index - 1, reused=len(ctx.calls) > 1 or runner.recomputes):
            for call, grad in zip(ctx.calls, grads):
                hidden, output = runner.graph_of(ctx.kept, call, ctx.with_input)
                inputs = [hidden, *parameters] if ctx.with_input else parameters
                found = list(torch.autograd.grad(output, inputs, grad, allow_unused=True))
                del hidden, output, inputs
                grad_inputs.append(found.pop(0) if ctx.with_input else None)
                _accumulate(parameters, found)
        return (None, None, *grad_inputs, *(None for _ in parameters))


class _Kept(list[Any]):
    """What backward needs of each micro-batch, in order; the graph owns it."""

    __slots__ = ("__weakref__",)


def _accumulate(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    for parameter, grad in zip(parameters, grads):
        if parameter.grad is None:
            parameter.grad = grad
        elif grad is not None:
            parameter.grad += grad
    hand_over("gradients", (parameter.grad for parameter in parameters))


@dataclass
class Passage:
    """What the blocks of one base have in common.

    Attributes:
        recomputed: how many blocks, the first ones, are recomputed in backward; the others keep their activations,
            which are free again when the recomputed ones need room.
        tile_tokens: positions of a tile of an MLP, 0: all; see `tiles`.
        keep_dequantized: keep a block's weights from the recomputation to their use, and from one micro-batch to the
            next.
        dropout_seed: of the adapter, set anew for each micro-batch.
        store: where the inputs of recomputed blocks are until backward.
        intercept: takes the place of every block while the arguments of a forward are recorded; see `_recorded`.
    """

    recomputed: int
    tile_tokens: int = 0
    keep_dequantized: bool = False
    dropout_seed: DropoutSeed = field(default_factory=DropoutSeed)
    store: InputStore = field(default_factory=lambda: input_store("device", torch.device("cpu"), Path()))
    intercept: Callable[[int, Tensor, Call], Tensor] | None = None


class BlockRunner:
    """Stands in a block's `forward`; transformers' own loop calls it with whatever its architecture passes."""

    def __init__(self, base: Base, index: int, settings: Passage) -> None:
        self.base, self.index, self.settings = base, index, settings
        self.block = base.blocks()[index]
        self.plain_forward = self.block.forward
        self.recomputes = index < settings.recomputed
        self.latest: Callable[[], list[Any] | None] = lambda: None  # what its last forward keeps, while it is wanted
        self._linears = frozen_linears(self.block)
        self._dense_bytes = sum(aligned(linear.dense_bytes) for linear in self._linears)
        row = base.architecture
        self._last: Any = None if row.output_norm else self.block.get_submodule(row.mlp_out)
        self._run_tokens_apart()

    def reserve(self) -> None:
        """Take what backward will need of the workspace now: the first step's loss is to meet it as later ones do."""
        if self.recomputes and self._keeper is not None:
            self._keeper.reserve(self._dense_bytes, self.base.device)

    @property
    def _keeper(self) -> Workspace | None:
        """Where the weights may be kept dequantized; None: nowhere, or there is nothing to dequantize."""
        return self._linears[0].workspace if self.settings.keep_dequantized and self._dense_bytes else None

    def _run_tokens_apart(self) -> None:
        """Put a `TokenWise` before the MLP, unless its output is needed in backward, and before each RMS norm."""
        row, settings = self.base.architecture, self.settings
        modules = {row.mlp_out.rpartition(".")[0]} if self._last is not None else set()
        if row.layer_norm_copies is None:
            modules |= {name for name, module in self.block.named_modules() if name.endswith("norm")}
        for name in modules:
            module, last = self.block.get_submodule(name), self._last if row.mlp_out.startswith(name) else None
            if isinstance(module.__dict__.get("forward"), TokenWise):
                del module.forward
            recomputes = self.recomputes or last is None
            module.forward = TokenWise(module, settings.tile_tokens, recomputes, settings.dropout_seed, last)

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = Call(args, kwargs, self.settings.dropout_seed.key)
        if self.settings.intercept is not None:
            return self.settings.intercept(self.index, hidden, call)
        return self.run([hidden], [call])[0]

    def run(self, hiddens: Sequence[Tensor], calls: Sequence[Call]) -> Sequence[Tensor]:
        """The block's outputs for several micro-batches."""
        parameters = self.parameters()
        if torch.is_grad_enabled() and (parameters or hiddens[0].requires_grad):
            return _RunBlock.apply(self, calls, *hiddens, *parameters)
        following = (self.index + 1) % len(self.base.blocks())  # the next forward begins at block 0
        with self.weights(following, reused=len(calls) > 1):
            return [self._run(hidden, call) for hidden, call in zip(hiddens, calls)]

    def parameters(self) -> list[nn.Parameter]:
        """What is trained in this block."""
        return [parameter for parameter in self.block.parameters() if parameter.requires_grad]

    @contextlib.contextmanager
    def weights(self, following: int, reused: bool) -> Iterator[None]:
        """Within the with-block the block's weights are there; if `reused`, they may be kept dequantized.

        Args:
            following: the block that will run next, to be fetched meanwhile.
        """
        with contextlib.ExitStack() as stack:
            if self.base.streamer is not None:
                stack.enter_context(self.base.streamer.block(self.index, following))
            if reused and self._keeper is not None:
                stack.enter_context(self._keeper.holding(self._dense_bytes, self.base.device))
            yield

    def run_and_keep(self, hidden: Tensor, call: Call, with_input: bool) -> tuple[Tensor, Any]:
        """(output, what `graph_of` needs): the input if the block is recomputed, else its graph."""
        hidden = hidden.detach()
        if self.recomputes:
            with torch.no_grad():
                return self._run(hidden, call), self.settings.store.keep(hidden)
        with torch.enable_grad():
            output = self._run(hidden.requires_grad_(with_input), call)
        return output.detach(), (hidden, output)

    def graph_of(self, waiting: list[Any], call: Call, with_input: bool) -> tuple[Tensor, Tensor]:
        """(input, output) of the first micro-batch that waits, with a graph between them.

        Of a recomputed block the output's values are not to be used.
        """
        kept = waiting.pop(0)
        if not self.recomputes:
            return kept
        hidden = self.settings.store.take(kept).requires_grad_(with_input)
        for upcoming in (waiting or self._waiting_before())[:1]:
            self.settings.store.prefetch(upcoming)
        with torch.enable_grad(), self._without_last_product():
            return hidden, self._run(hidden, call)

    def _waiting_before(self) -> list[Any]:
        """What the block before this one, whose backward comes next, has kept; a hint."""
        before = self.base.blocks()[self.index - 1].forward if self.index else None
        return (before.latest() or []) if isinstance(before, BlockRunner) and before.recomputes else []

    @contextlib.contextmanager
    def _without_last_product(self) -> Iterator[None]:
        if self._last is None:
            yield
            return
        self._last.output_unused = True
        try:
            yield
        finally:
            self._last.output_unused = False

    def _run(self, hidden: Tensor, call: Call) -> Tensor:
        self.settings.dropout_seed.key = call.dropout_key
        return self.plain_forward(hidden, *call.args, **call.kwargs)


def attach(base: Base, recomputed: int | bool = True, **settings: Any) -> None:
    """Put a `BlockRunner` before every block.

    Args:
        recomputed: how many blocks are recomputed in backward; True: all, False: none.
        settings: the other attributes of `Passage`.
    """
    blocks = base.blocks()
    count = len(blocks) * recomputed if isinstance(recomputed, bool) else recomputed
    passage = Passage(count, **settings)
    for index, block in enumerate(blocks):
        if isinstance(block.__dict__.get("forward"), BlockRunner):
            del block.forward
        block.forward = BlockRunner(base, index, passage)
        block.forward.reserve()


def passage_of(base: Base) -> Passage:
    """What the blocks have in common; with nothing attached yet, by default."""
    if not isinstance(base.blocks()[0].__dict__.get("forward"), BlockRunner):
        attach(base)
    runner: Any = base.blocks()[0].forward
    return runner.settings


def last_hidden_states(base: Base, batches: Sequence[Any], dropout_keys: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The hidden state after the final norm, [B, T, D], of each micro-batch; they pass the blocks together.

    transformers' own forward runs twice without its blocks: once to record what it passes to each of them, once (on any
    embeddings: they go nowhere) to do what it does after them. So no architecture's masks and positions are known here.
    """
    settings = passage_of(base)
    runners: list[Any] = [block.forward for block in base.blocks()]
    hiddens: list[Tensor] = []
    recorded: list[list[Call]] = []
    for batch, key in backward_in_order(list(zip(batches, dropout_keys, strict=True))):
        settings.dropout_seed.key = key
        calls: list[Call] = []

        def record(index: int, hidden: Tensor, call: Call, calls: list[Call] = calls) -> Tensor:
            if index == 0:
                hiddens.insert(0, hidden)
            calls.append(call)
            return hidden

        _around_blocks(base, batch, settings, record, input_ids=batch.input_ids.to(base.device))
        recorded.insert(0, calls)
    for runner, of_block in zip(runners, zip(*recorded, strict=True)):
        hiddens = list(runner.run(hiddens, of_block))
    mark("final norm")
    last = [
        _around_blocks(base, batch, settings, lambda *_, after=hidden: after, inputs_embeds=hidden.detach())
        for batch, hidden in backward_in_order(list(zip(batches, hiddens)))
    ]
    return last[::-1]


def backward_in_order(micro_batches: Sequence[Any]) -> Iterator[Any]:
    """The last first: autograd takes what was made last first, so backward then goes from the first to the last.

    So what is trained outside the blocks adds up its gradients in the order of the micro-batches, as blocks do.
    """
    return reversed(micro_batches)


def _around_blocks(
    base: Base, batch: Any, settings: Passage, intercept: Callable[..., Tensor], **inputs: Tensor
) -> Tensor:
    """transformers' forward of the decoder on `inputs` with `intercept` in the place of every block."""
    settings.intercept = intercept
    try:
        positions = batch.position_ids.to(base.device)
        return base.model.base_model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
    finally:
        settings.intercept = None
