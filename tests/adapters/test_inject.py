"""Injection: what is targeted, how it starts, which adapters take part."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.adapters.inject import activate, branches, inject, merge, per_row, trainable_parameters, unmerge
from qlora_kit.adapters.store import load_adapter
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import load_base
from qlora_kit.errors import ModelError, RecipeError
from qlora_kit.recipe import Adapter, Model
from tests.peft_adapters import made_by_peft


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


# ------------------------------------------------------------------------------------------------ mixed in a batch

ROWS = ("one", "two", "two", None, "one")


def two_adapters(folder, tmp_path, model_type="llama", **second):
    """An fp32 base with two adapters of PEFT's, `one` and `two`, and PEFT's own model with both."""
    theirs = made_by_peft(folder, model_type, tmp_path / "one", target_modules="all-linear")
    made_by_peft(folder, model_type, tmp_path / "two", seed=4, **{"target_modules": "all-linear", "r": 2} | second)
    base = load_base(Model(path=str(folder), quantization="none", dtype="float32"))
    for name in ("one", "two"):
        load_adapter(base, tmp_path / name, name)
    theirs.load_adapter(tmp_path / "one", "one")
    theirs.load_adapter(tmp_path / "two", "two")
    return base, theirs.eval()


@pytest.fixture(scope="module")
def five():
    """Token ids, [5, 12]."""
    return torch.randint(3, 128, (5, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_rows_of_one_batch_have_the_adapters_that_peft_gives_them(model_type, tiny_model, tmp_path, five):
    base, theirs = two_adapters(tiny_model(model_type), tmp_path, model_type)
    with torch.no_grad():
        expected = theirs(input_ids=five, adapter_names=[name or "__base__" for name in ROWS]).logits
    with per_row(base, ROWS):
        found = logits(base, five)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)
    with per_row(base, ROWS[::-1]):
        assert not torch.allclose(logits(base, five)[:4], expected[:4], atol=1e-2)


@pytest.mark.parametrize("second", [{}, {"use_dora": True}, {"target_modules": ["v_proj"]}])
def test_each_row_is_what_its_adapter_says_alone(second, tiny_model, tmp_path, five):
    base, _ = two_adapters(tiny_model("llama"), tmp_path, **second)
    with per_row(base, ROWS):
        found = logits(base, five)
    for row, name in enumerate(ROWS):
        activate(base, [name] if name else [])
        torch.testing.assert_close(found[row], logits(base, five)[row], atol=2e-5, rtol=1e-5)


def test_rows_without_an_adapter_are_the_base_bit_for_bit_on_4_bits(tiny_model, ids):
    base = base_of(tiny_model("llama"))
    plain = logits(base, ids)
    inject(base, Adapter(), seed=0)
    for branch in branches(base).values():
        branch.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(branch.index))
    with per_row(base, [None, "default"]):
        found = logits(base, ids)
    assert torch.equal(found[0], plain[0])
    assert not torch.allclose(found[1], plain[1], atol=0.1)


def test_after_mixed_rows_the_adapters_are_those_of_before(tiny_model, tmp_path, five):
    base, _ = two_adapters(tiny_model("llama"), tmp_path)
    before = logits(base, five)
    with pytest.raises(ValueError, match="5 rows was promised, this one has 2"), per_row(base, ROWS):
        logits(base, five[:2])
    assert torch.equal(logits(base, five), before)


def test_what_cannot_be_mixed_is_refused(tiny_model, tmp_path, five):
    base, _ = two_adapters(tiny_model("llama"), tmp_path, modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match="'two' changes 'lm_head.weight', which all rows"), per_row(base, ROWS):
        pass
    with pytest.raises(ModelError, match="'three' is not loaded"), per_row(base, ["three"]):
        pass
    activate(base, ["one"])
    merge(base)
    with pytest.raises(ModelError, match="unmerge it"), per_row(base, ["one"]):
        pass


def test_adapters_are_merged_in_place_and_taken_out_bit_for_bit(tiny_model, tmp_path, five):
    base, _ = two_adapters(tiny_model("llama"), tmp_path)
    plain = {name: linear.dense.clone() for name, linear in base.linears().items()}
    for names in (["one"], ["two"], ["one", "two"]):
        activate(base, names)
        before = logits(base, five)
        merge(base)
        torch.testing.assert_close(logits(base, five), before, atol=1e-4, rtol=1e-4)
        unmerge(base)
        assert torch.equal(logits(base, five), before)
    assert all(torch.equal(linear.dense, plain[name]) for name, linear in base.linears().items())
