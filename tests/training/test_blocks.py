"""Recomputed blocks give the gradients of stored ones, bit for bit."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.adapters.inject import branches, inject, trainable_parameters
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base import nf4
from qlora_kit.base.loader import load_base
from qlora_kit.data.batches import MicroBatch
from qlora_kit.profiling.simulated_device import simulated_device
from qlora_kit.recipe import Adapter, Model
from qlora_kit.training.blocks import attach
from qlora_kit.training.loss import batch_losses
from qlora_kit.training.offload import input_store


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


def micro_batches(ids: torch.Tensor) -> list[MicroBatch]:
    """Three rows of different lengths, one of them two documents."""
    made = []
    for row, documents in ((ids[:1], [24]), (ids[1:, :16], [16]), (ids[1:], [9, 15])):
        positions = torch.cat([torch.arange(length) for length in documents])[None]
        made.append(MicroBatch(row, row.roll(-1, 1), positions, row.numel(), row.numel(), [documents]))
    return made


def step(
    folder, batches: list[MicroBatch], together: int, recomputed: int | bool = True, *, device: str = "cpu", **passage
) -> list:
    """Losses and gradients of one optimizer step with dropout, on the host."""
    base = load_base(Model(path=str(folder)), device)
    seed = inject(base, Adapter(rank=4, dropout=0.2), seed=0)
    for branch in branches(base).values():
        values = torch.randn(branch.lora_B.shape, generator=torch.Generator().manual_seed(branch.index))
        branch.lora_B.data.copy_(values * 0.05)
        branch.train()
    attach(base, recomputed, dropout_seed=seed, **passage)
    losses: list[torch.Tensor] = []
    for start in range(0, len(batches), together):
        keys = [(0, 0, index) for index in range(start, min(start + together, len(batches)))]
        found = batch_losses(base, batches[start : start + together], 16, keys)
        torch.stack(found).sum().backward()
        losses += [loss.detach().cpu() for loss in found]
    return losses + [parameter.grad.cpu() for _, parameter in trainable_parameters(base)]


def same(one: list, other: list) -> bool:
    return all(torch.equal(a, b) and a.any() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_micro_batches_that_pass_together_give_the_gradients_of_one_after_the_other(model_type, tiny_model, ids):
    folder, batches = tiny_model(model_type), micro_batches(ids)
    one_by_one = step(folder, batches, together=1)
    assert same(step(folder, batches, together=2), one_by_one)
    assert same(step(folder, batches, together=3), one_by_one)


@pytest.mark.parametrize("recomputed", [0, 1])
@pytest.mark.parametrize("together", [1, 3])
def test_any_number_of_recomputed_blocks_gives_the_same_gradients(recomputed, together, tiny_model, ids):
    folder, batches = tiny_model("llama"), micro_batches(ids)
    assert same(step(folder, batches, together, recomputed), step(folder, batches, 1))


@pytest.mark.parametrize("together", [1, 3])
def test_weights_kept_dequantized_within_a_block_change_nothing(together, tiny_model, ids):
    folder, batches = tiny_model("llama"), micro_batches(ids)
    assert same(step(folder, batches, together, keep_dequantized=True), step(folder, batches, 1))


def counted_dequantizations(monkeypatch, *arguments, **options) -> int:
    calls, real = [], nf4.dequantize
    monkeypatch.setattr(nf4, "dequantize", lambda *given, **named: calls.append(1) or real(*given, **named))
    step(*arguments, **options)
    monkeypatch.undo()
    return len(calls)


def test_each_weight_is_dequantized_as_often_as_is_said(tiny_model, ids, monkeypatch):
    folder, batches, linears = tiny_model("llama"), micro_batches(ids), 2 * 7
    last, first = (
        2,
        3,
    )  # `down_proj` is not needed in recomputation; block 0's q, k and v need no gradient of their input

    def count(**options) -> int:
        return counted_dequantizations(monkeypatch, folder, batches, **options)

    assert count(together=1) == 3 * (3 * linears - last - first)
    assert count(together=1, keep_dequantized=True) == 3 * 2 * linears
    assert count(together=3, keep_dequantized=True) == 2 * linears
    assert count(together=1, recomputed=0) == 3 * (2 * linears - first)


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize(
    "model_type", ["llama", *(pytest.param(other, marks=pytest.mark.slow) for other in ("gemma2", "gpt2"))]
)
def test_offloaded_inputs_change_nothing_on_a_device_with_late_copies(model_type, tier, tiny_model, ids, tmp_path):
    depth = {"n_layer" if model_type == "gpt2" else "num_hidden_layers": 4}
    folder, batches = tiny_model(model_type, **depth), micro_batches(ids)
    expected = step(folder, batches, 1)
    assert same(step(folder, batches, 2, store=input_store(tier, torch.device("cpu"), tmp_path)), expected)
    with simulated_device():
        store = input_store(tier, torch.device("simgpu"), tmp_path)
        assert same(step(folder, batches, 2, device="simgpu", store=store), expected)
