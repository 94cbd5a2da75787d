"""What merging takes from an update is measured on what would be written."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.adapters.inject import branches, inject
from qlora_kit.adapters.store import save_adapter
from qlora_kit.base.loader import load_base
from qlora_kit.base.quantize_model import quantize_model
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


def first_row(folder, out, **how):
    """Of an adapter made in `out`: the merge, its evidence, the first tensor with its row, and its whole update."""
    adapter = adapter_of_size(folder, out, 0.1)
    merge = open_merge(folder, out, **how)
    found = evidence(merge)
    name, row = next(iter(found["tensors"].items()))
    branch = adapter[merge.linear(name)]
    return merge, found, name, row, (branch.scale * (branch.lora_B.double() @ branch.lora_A.double())).detach()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_evidence_is_the_norms_of_what_would_be_written(model_type, tiny_model, tmp_path):
    merge, found, name, row, update = first_row(tiny_model(model_type), tmp_path / "a", dtype="bfloat16")
    error = merge.weights.read(name).double() - merge.base.stored.read(name).double()
    assert row["quantization_error"] == pytest.approx((error.norm() / update.norm()).item(), rel=1e-6)
    assert 0 < row["rounding_error"] < 0.1
    assert len(found["tensors"]) == len(merge.changes.branches)
    assert found["median"]["unchanged"] < 0.2


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_evidence_of_4_bits_is_that_of_the_checkpoint(model_type, tiny_model, tmp_path):
    merge, _, name, row, update = first_row(tiny_model(model_type), tmp_path / "a", onto="4bit")
    before = merge.weights.read(name).double()
    before = before.t() if model_type == "gpt2" else before
    written, trained = (merge.quantization.through(w.bfloat16()).double() for w in (before + update, before))
    assert row["requantization_error"] == pytest.approx(((written - before - update).norm() / update.norm()).item())
    assert row["surviving"] == pytest.approx((((written - trained) * update).sum() / update.square().sum()).item())


def test_a_small_update_survives_4_bits_from_the_original_weights_and_not_from_dequantized_ones(tiny_model, tmp_path):
    folder = tiny_model("llama")
    adapter_of_size(folder, tmp_path / "a", 3e-4)
    quantize_model(folder, tmp_path / "q")
    medians = [evidence(open_merge(base, tmp_path / "a", onto="4bit"))["median"] for base in (folder, tmp_path / "q")]
    assert [median["surviving"] for median in medians] == [pytest.approx(1, abs=0.2), pytest.approx(0, abs=0.2)]
    assert medians[0]["unchanged"] < medians[1]["unchanged"] == pytest.approx(1, abs=0.01)
    assert all(median["requantization_error"] > 1 for median in medians)
