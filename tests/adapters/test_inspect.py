"""What `adapter show` says is true of the updates as whole matrices."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.adapters.factors import open_adapter, place
from qlora_kit.adapters.inspect import effective_rank, energy_rank, grid, look, png, table
from tests.peft_adapters import made_by_peft


def test_norms_and_singular_values_are_those_of_the_update(tiny_model, tmp_path):
    made_by_peft(tiny_model("llama"), "llama", tmp_path, target_modules="all-linear", use_rslora=True)
    adapter, portrait = open_adapter(tmp_path), look(tmp_path)
    assert len(portrait.updates) == 14
    for update in portrait.updates:
        branch = adapter.branch(update.linear)
        sigma = torch.linalg.svdvals(branch.scale * branch.lora_B.double() @ branch.lora_A.double())
        assert update.singular_values == pytest.approx(sigma[:4].tolist())
        assert update.norm == pytest.approx(float(sigma.norm()))
        assert (update.rank, update.alpha) == (4, pytest.approx(6 * 4 / 4**0.5))


@pytest.mark.parametrize(
    ("sigma", "effective", "energy"),
    [([3.0, 3.0, 3.0, 0.0], 3.0, 3), ([5.0, 0.0], 1.0, 1), ([0.0, 0.0], 0.0, 0), ([3.0, 1.0], 1.7548, 1)],
)
def test_effective_rank_counts_equal_singular_values(sigma, effective, energy):
    assert effective_rank(torch.tensor(sigma).double()) == pytest.approx(effective, abs=1e-4)
    assert energy_rank(torch.tensor(sigma).double(), 0.9) == energy


def test_table_and_picture_have_every_module(tiny_model, tmp_path):
    made_by_peft(tiny_model("llama"), "llama", tmp_path, target_modules=r".*q_proj|.*0\.mlp\.down_proj")
    portrait = look(tmp_path)
    lines = "\n".join(table(portrait.updates))
    assert "self_attn.q_proj" in lines
    assert "mlp.down_proj" in lines
    rows, columns, values = grid(portrait.updates, lambda update: update.norm)
    assert (rows, len(columns)) == (["0", "1"], 2)
    assert sum(value == value for row in values for value in row) == 3
    assert png(portrait).startswith(b"\x89PNG")
    assert place("lm_head") == ("-", "lm_head")
    assert place("transformer.h.11.attn.c_attn") == ("11", "attn.c_attn")


def test_dora_is_shown_without_its_magnitudes(tiny_model, tmp_path):
    made_by_peft(tiny_model("llama"), "llama", tmp_path, target_modules=["q_proj"], use_dora=True)
    found = look(tmp_path).to_json()
    assert found["use_dora"]
    assert len(found["other_tensors"]) == len(found["updates"]) == 2
