"""MLPs over tiles of tokens: the same gradients up to the order of one sum, exactly the same kept or run again."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.adapters.inject import branches, inject, trainable_parameters
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import load_base
from qlora_kit.profiling.simulated_device import simulated_device
from qlora_kit.recipe import Adapter, Model
from qlora_kit.training.blocks import attach


def step(folder, ids, recomputed: bool, tile: int, *, dropout: float = 0.0, device: str = "cpu", **model) -> list:
    """Loss and gradients, the adapter in fp32."""
    base = load_base(Model(path=str(folder), **model), device)
    seed = inject(base, Adapter(rank=4, dropout=dropout, dtype="float32"), seed=0)
    for branch in branches(base).values():
        values = torch.randn(branch.lora_B.shape, generator=torch.Generator().manual_seed(branch.index))
        branch.lora_B.data.copy_(values * 0.05)
        branch.train()
    attach(base, recomputed, tile_tokens=tile, dropout_seed=seed)
    loss = base.model(input_ids=ids.to(device), use_cache=False).logits.float().square().mean()
    loss.backward()
    return [loss.detach().cpu()] + [parameter.grad.cpu() for _, parameter in trainable_parameters(base)]


@pytest.mark.parametrize("tile", [7, 8])  # of 24 tokens: with a rest, without
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_gradients_are_those_of_the_whole_sequence_but_for_rounding(model_type, tile, tiny_model, ids):
    options = {"dtype": "float32", "quantization": "none"}
    whole, tiled = (step(tiny_model(model_type), ids, True, size, **options) for size in (0, tile))
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_kept_tiles_and_tiles_run_again_give_the_same_bits(model_type, tiny_model, ids):
    kept, again = (step(tiny_model(model_type), ids, recomputed, 7, dropout=0.2) for recomputed in (False, True))
    assert all(torch.equal(one, other) and one.any() for one, other in zip(kept, again, strict=True))


def test_each_tile_has_dropout_of_its_own(tiny_model, ids):
    same_tokens = ids[:1, :1].expand(1, 16)
    with_tiles, whole = (step(tiny_model("llama"), same_tokens, True, tile, dropout=0.5) for tile in (8, 0))
    assert not all(torch.equal(one, other) for one, other in zip(with_tiles, whole, strict=True))


def peak_bytes(folder, tokens: int, tile: int) -> int:
    ids = torch.ones(1, tokens, dtype=torch.long)
    with simulated_device(shapes_only=True) as device:
        step(folder, ids, True, tile, device="simgpu")
        return device.peak_bytes


def test_of_the_mlp_only_a_tile_exists(tiny_model):
    folder = tiny_model("llama", intermediate_size=1024, max_position_embeddings=2048)
    grown = [peak_bytes(folder, 2048, tile) - peak_bytes(folder, 1024, tile) for tile in (0, 256)]
    assert grown[1] < grown[0] / 3
