"""Chunked loss and its gradient against torch's own on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qlora_kit.data.tokenize import IGNORE_INDEX
from qlora_kit.training.loss import chunked_cross_entropy


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [N=17, D=8], head [V=37, D], targets [N] with ignored ones."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 37, (17,), generator=generator)
    targets[[0, 5, 6, 16]] = IGNORE_INDEX
    return torch.randn(17, 8, generator=generator), torch.randn(37, 8, generator=generator), targets


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 1000])
def test_loss_and_gradient_equal_the_unchunked_reference(chunk_tokens, softcap):
    hidden, head, targets = problem()
    hidden.requires_grad_()
    logits = hidden @ head.T if softcap is None else softcap * torch.tanh(hidden @ head.T / softcap)
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    loss = chunked_cross_entropy(hidden, head, targets, chunk_tokens=chunk_tokens, softcap=softcap)
    torch.testing.assert_close(loss, expected)
    (wanted,), (grad,) = torch.autograd.grad(expected, hidden), torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(grad, wanted)
    assert not grad[targets == IGNORE_INDEX].any()


def test_nothing_learned_is_zero_with_zero_gradient():
    hidden, head, targets = problem()
    loss = chunked_cross_entropy(hidden.requires_grad_(), head, torch.full_like(targets, IGNORE_INDEX), chunk_tokens=4)
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()


def test_different_lengths_are_refused():
    hidden, head, targets = problem()
    with pytest.raises(ValueError, match="17 hidden states, 16 targets"):
        chunked_cross_entropy(hidden, head, targets[1:], chunk_tokens=4)
