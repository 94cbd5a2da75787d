"""Recomputed blocks give the gradients of stored ones, bit for bit."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.adapters.inject import branches, inject, trainable_parameters
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import load_base
from qlora_kit.recipe import Adapter, Model
from qlora_kit.training.blocks import attach


def gradients(folder, ids, enabled: bool, dropout: float = 0.0) -> list[torch.Tensor]:
    base = load_base(Model(path=str(folder)))
    seed = inject(base, Adapter(rank=4, dropout=dropout), seed=0)
    seed.key = (1, 2, 3)
    for branch in branches(base).values():
        branch.lora_B.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(branch.index))
        branch.train()
    attach(base, enabled)
    base.model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
    return [parameter.grad for _, parameter in trainable_parameters(base)]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_recomputed_gradients_are_bit_identical_to_stored_ones(model_type, tiny_model, ids):
    stored, recomputed = (gradients(tiny_model(model_type), ids, enabled) for enabled in (False, True))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(stored, recomputed, strict=True))


def test_recomputation_draws_the_same_dropout(tiny_model, ids):
    stored, recomputed = (gradients(tiny_model("llama"), ids, enabled, dropout=0.3) for enabled in (False, True))
    without = gradients(tiny_model("llama"), ids, True)
    assert all(torch.equal(a, b) for a, b in zip(stored, recomputed, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(stored, without, strict=True))


def test_only_the_input_of_a_block_is_kept(tiny_model, ids):
    base = load_base(Model(path=str(tiny_model("llama"))))
    inject(base, Adapter(), seed=0)
    attach(base, True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base.model.model(input_ids=ids, use_cache=False)
    hidden = [tensor for tensor in kept if tensor.shape == (*ids.shape, 64)]
    assert len(hidden) <= 2 + 3  # one a block, and what the final norm keeps
