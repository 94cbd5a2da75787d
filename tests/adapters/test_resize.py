"""Resized adapters: exact where the rank suffices, the best of their rank where it does not, and the error is true."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.factors import open_adapter
from qlora_kit.adapters.resize import resize, total
from tests.peft_adapters import logits, made_by_peft


def update(branch) -> torch.Tensor:
    return branch.scale * branch.lora_B.double() @ branch.lora_A.double()


def test_rank_that_suffices_keeps_every_bit(tiny_model, tmp_path):
    made_by_peft(tiny_model("llama"), "llama", tmp_path / "a", target_modules=["q_proj"], rank_pattern={"0.*q_proj": 2})
    cuts = resize(tmp_path / "a", tmp_path / "out", rank=4)
    before, after = open_adapter(tmp_path / "a"), open_adapter(tmp_path / "out")
    for linear in before.shapes:
        old, new = before.branch(linear), after.branch(linear)
        assert torch.equal(old.lora_A, new.lora_A)
        assert torch.equal(old.lora_B, new.lora_B)
        assert old.scale == new.scale
    assert total(cuts).error == 0
    assert sorted(cut.rank for cut in cuts) == [2, 4]


@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 0.8}])
def test_error_is_the_smallest_that_the_rank_allows_and_is_stated(how, tiny_model, tmp_path):
    made_by_peft(tiny_model("llama"), "llama", tmp_path / "a", target_modules="all-linear")
    cuts = resize(tmp_path / "a", tmp_path / "out", **how)
    before, after = open_adapter(tmp_path / "a"), open_adapter(tmp_path / "out")
    for cut in cuts:
        old, new = update(before.branch(cut.linear)), update(after.branch(cut.linear))
        assert cut.error == pytest.approx(float((old - new).norm()), rel=1e-6)
        assert cut.error == pytest.approx(float(torch.linalg.svdvals(old)[cut.rank :].norm()), rel=1e-4)
        assert cut.rank < cut.rank_before == 4
        if "energy" in how:
            assert cut.relative_error**2 <= 0.2


def test_update_of_a_lower_rank_than_its_factors_is_kept_by_that_rank_and_loads_in_peft(tiny_model, tmp_path, ids):
    folder = tiny_model("llama")
    theirs = made_by_peft(folder, "llama", tmp_path / "a", target_modules=["q_proj", "down_proj"])
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "q_proj.lora_B" in name:
                parameter[:, 2:] = 0
    theirs.save_pretrained(tmp_path / "a")
    cuts = resize(tmp_path / "a", tmp_path / "out", energy=1 - 1e-9)
    assert {cut.linear.rpartition(".")[2]: cut.rank for cut in cuts} == {"q_proj": 2, "down_proj": 4}
    assert total(cuts).relative_error < 1e-6
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=2e-5, rtol=1e-5)
