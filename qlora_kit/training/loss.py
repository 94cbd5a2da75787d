"""Next-token loss that never holds the logits of more than one chunk of tokens.

Why: at 4096 tokens and a vocabulary of 128k the logits alone are 2.1 GB in fp32, and a plain loss holds four of them.
How: positions that are not learned are left out before the projection; each chunk is projected, scored and turned into
its part of the hidden state's gradient at once, in the forward, so that nothing of it remains.
Shapes: N tokens, D hidden, V vocabulary. Imported by: training.loop, training.evaluate, export.verify.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.base.loader import Base
from qlora_kit.data.tokenize import IGNORE_INDEX
from qlora_kit.training.blocks import last_hidden_states


def chunked_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, chunk_tokens: int, softcap: float | None = None
) -> Tensor:
    """Sum of the next-token losses of `hidden_ND @ head_VD.T`.

    Equal to `F.cross_entropy(reduction="sum")` on the fp32 logits up to the order of summation.

    Args:
        hidden_ND: last hidden state, [N, D]; gradients flow into it.
        head_VD: output projection, [V, D], frozen.
        targets_N: ids to predict, [N], already shifted; IGNORE_INDEX is skipped.
        chunk_tokens: learned positions whose logits exist at a time.
        softcap: logits become c tanh(logits / c) (Gemma 2, arXiv:2408.00118, section 2).
    Returns: fp32 scalar, nats; zero when nothing is learned.
    Raises: ValueError: lengths differ, or chunk_tokens < 1.
    """
    if len(hidden_ND) != len(targets_N) or chunk_tokens < 1:
        raise ValueError(f"{len(hidden_ND)} hidden states, {len(targets_N)} targets, chunks of {chunk_tokens}")
    return _ChunkedCrossEntropy.apply(hidden_ND, head_VD, targets_N, chunk_tokens, softcap)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        chunk_tokens: int,
        softcap: float | None,
    ) -> Tensor:
        learned = (targets_N != IGNORE_INDEX).nonzero().squeeze(1)
        hidden_ND_learned, targets = hidden_ND[learned], targets_N[learned]
        grad = torch.empty_like(hidden_ND_learned) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, len(learned), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            loss, grad_logits = _score(
                F.linear(hidden_ND_learned[chunk], head_VD), targets[chunk], softcap, grad is not None
            )
            total += loss
            if grad is not None and grad_logits is not None:
                torch.mm(grad_logits.to(head_VD.dtype), head_VD, out=grad[chunk])
            del grad_logits
        if grad is not None:
            ctx.save_for_backward(learned, grad)
            ctx.shape = hidden_ND.shape
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        learned, grad = ctx.saved_tensors
        full = grad.new_zeros(ctx.shape)
        full[learned] = grad * grad_total.to(grad.dtype)
        return full, None, None, None, None


def _score(
    logits_CV: Tensor, targets_C: Tensor, softcap: float | None, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of one chunk and, in the logits' place, the gradient of that sum, [C, V] fp32."""
    logits = logits_CV.float()
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    log_normaliser = logits.logsumexp(dim=-1)
    picked = logits.gather(1, targets_C[:, None]).squeeze(1)
    loss = (log_normaliser - picked).sum()
    if not with_grad:
        return loss, None
    slope = None if softcap is None else 1 - (logits / softcap).square_()
    grad = logits.sub_(log_normaliser[:, None]).exp_()
    grad.scatter_add_(1, targets_C[:, None], grad.new_full((len(grad), 1), -1.0))
    return loss, grad if slope is None else grad.mul_(slope)


def batch_losses(
    base: Base, batches: Sequence[Any], chunk_tokens: int, dropout_keys: Sequence[tuple[int, ...]] | None = None
) -> list[Tensor]:
    """Summed loss of each `data.batches.MicroBatch` on the base with its active adapters; see `blocks.attach`.

    Args:
        batches: they pass each block together; block inputs of all of them are kept for backward.
        dropout_keys: of each, what its dropout is drawn from.
    """
    hiddens = last_hidden_states(base, batches, dropout_keys or [()] * len(batches))
    softcap = getattr(base.model.config, "final_logit_softcapping", None)
    head = base.model.get_output_embeddings().weight
    return [
        chunked_cross_entropy(
            hidden.flatten(0, 1),
            head,
            batch.targets.to(base.device).flatten(),
            chunk_tokens=chunk_tokens,
            softcap=softcap,
        )
        for hidden, batch in zip(hiddens, batches)
    ]
