"""Injection: what is targeted, how it starts, which adapters take part."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.adapters.inject import activate, branches, inject, merge, trainable_parameters, unmerge
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import load_base
from qlora_kit.errors import ModelError, RecipeError
from qlora_kit.recipe import Adapter, Model


def base_of(folder, quantization="nf4"):
    return load_base(Model(path=str(folder), quantization=quantization))


@torch.no_grad()
def logits(base, ids):
    return base.model(input_ids=ids).logits


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_fresh_adapter_leaves_the_logits_bit_identical(model_type, quantization, tiny_model, ids):
    base = base_of(tiny_model(model_type), quantization)
    before = logits(base, ids)
    inject(base, Adapter(), seed=0)
    assert torch.equal(logits(base, ids), before)


def test_targets_are_those_of_the_recipe(tiny_model):
    base = base_of(tiny_model("llama"))
    inject(base, Adapter(target_modules=["q_proj", "v_proj"]), seed=0)
    assert {name.rpartition(".")[2] for name in branches(base)} == {"q_proj", "v_proj"}
    assert len(branches(base)) == 4


def test_unknown_target_lists_what_there_is(tiny_model):
    with pytest.raises(RecipeError, match=r"matches no linear.*q_proj.*did you mean 'q_proj'"):
        inject(base_of(tiny_model("llama")), Adapter(target_modules=["q_porj"]), seed=0)


def test_start_of_A_does_not_depend_on_the_other_targets(tiny_model):
    first, second = base_of(tiny_model("llama")), base_of(tiny_model("llama"))
    inject(first, Adapter(), seed=3)
    inject(second, Adapter(target_modules=["v_proj"]), seed=3)
    name = "model.layers.1.self_attn.v_proj"
    assert torch.equal(branches(first)[name].lora_A, branches(second)[name].lora_A)


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_A_is_random_and_B_is_zero(init, tiny_model):
    base = base_of(tiny_model("llama"))
    inject(base, Adapter(init=init), seed=0)
    for name, parameter in trainable_parameters(base):
        assert bool(parameter.any()) == name.endswith("lora_A")


def test_adapters_switch_on_one_base(tiny_model, ids):
    base = base_of(tiny_model("llama"))
    plain = logits(base, ids)
    for seed, name in enumerate(("one", "two")):
        inject(base, Adapter(), seed, name)
        for branch in branches(base, name).values():
            branch.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    two = logits(base, ids)
    activate(base, ["one"])
    one = logits(base, ids)
    assert not torch.equal(one, two)
    activate(base, [])
    assert torch.equal(logits(base, ids), plain)
    with pytest.raises(ModelError, match="did you mean 'two'"):
        activate(base, ["twoo"])


def test_merge_in_place_and_back_restores_the_logits(tiny_model, ids):
    base = base_of(tiny_model("llama"))
    inject(base, Adapter(), seed=0)
    for branch in branches(base).values():
        branch.lora_B.data.normal_(0, 0.1)
    before = logits(base, ids)
    merge(base)
    torch.testing.assert_close(logits(base, ids), before, atol=0.1, rtol=0.1)
    unmerge(base)
    assert torch.equal(logits(base, ids), before)
