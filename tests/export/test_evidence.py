"""What merging takes from an update is measured on what would be written."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.adapters.inject import branches, inject
from qlora_kit.adapters.store import save_adapter
from qlora_kit.base.loader import load_base
from qlora_kit.export.evidence import evidence
from qlora_kit.export.merge import open_merge
from qlora_kit.recipe import Adapter, Model


def adapter_of_size(folder, out, size):
    """An adapter on an NF4 base, whose updates are about so large."""
    base = load_base(Model(path=str(folder), quantization="nf4"))
    inject(base, Adapter(rank=4), seed=0)
    for branch in branches(base).values():
        branch.lora_B.data.normal_(0, size, generator=torch.Generator().manual_seed(branch.index))
    save_adapter(base, out)
    return branches(base)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_evidence_is_the_norms_of_what_would_be_written(model_type, tiny_model, tmp_path):
    folder = tiny_model(model_type)
    adapter = adapter_of_size(folder, tmp_path / "a", 0.1)
    merge = open_merge(folder, tmp_path / "a", dtype="bfloat16")
    found = evidence(merge)
    name, row = next(iter(found["tensors"].items()))
    branch = adapter[merge.linear(name)]
    update = branch.scale * (branch.lora_B.double() @ branch.lora_A.double())
    error = merge.weights.read(name).double() - merge.base.stored.read(name).double()
    assert row["quantization_error"] == pytest.approx((error.norm() / update.norm()).item(), rel=1e-6)
    assert 0 < row["rounding_error"] < 0.1
    assert len(found["tensors"]) == len(merge.changes.branches)
    assert found["median"]["unchanged"] < 0.2


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_evidence_of_4_bits_is_that_of_the_checkpoint(model_type, tiny_model, tmp_path):
    folder = tiny_model(model_type)
    adapter = adapter_of_size(folder, tmp_path / "a", 0.1)
    merge = open_merge(folder, tmp_path / "a", onto="4bit")
    found = evidence(merge)
    name, row = next(iter(found["tensors"].items()))
    branch = adapter[merge.linear(name)]
    update = (branch.scale * (branch.lora_B.double() @ branch.lora_A.double())).detach()
    before = merge.weights.read(name).double()
    before = before.t() if model_type == "gpt2" else before
    moved = merge.quantization.through((before + update).bfloat16()).double()
    assert row["requantization_error"] == pytest.approx(((moved - before - update).norm() / update.norm()).item())
    assert row["surviving"] == pytest.approx((((moved - before) * update).sum() / update.square().sum()).item())


def test_of_a_small_update_hardly_a_code_changes(tiny_model, tmp_path):
    medians = {}
    for size in (1e-4, 0.5):
        adapter_of_size(tiny_model("llama"), tmp_path / str(size), size)
        medians[size] = evidence(open_merge(tiny_model("llama"), tmp_path / str(size), onto="4bit"))["median"]
    assert medians[1e-4]["unchanged"] > 0.99
    assert medians[1e-4]["requantization_error"] > 1
    assert medians[0.5]["unchanged"] < 0.7
    assert medians[0.5]["surviving"] == pytest.approx(1, abs=0.1)
    assert medians[0.5]["requantization_error"] < 0.5
