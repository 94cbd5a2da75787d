"""A merged folder that is not the model that was trained does not pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from qlora_kit.adapters.inject import branches, inject
from qlora_kit.adapters.store import save_adapter
from qlora_kit.base.loader import Base, load_base
from qlora_kit.data.batches import eval_batches
from qlora_kit.data.tokenize import IGNORE_INDEX, Example
from qlora_kit.errors import ModelError
from qlora_kit.export.merge import merge_model
from qlora_kit.export.verify import prove
from qlora_kit.recipe import Adapter, Model
from qlora_kit.training.evaluate import evaluate


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> tuple[Base, Path, float, list[Example]]:
    """A base with an adapter that matters, its saved folder, its loss, and what the loss is over."""
    base = load_base(Model(path=str(tiny_model("llama")), quantization="nf4"))
    inject(base, Adapter(rank=4), seed=0)
    for branch in branches(base).values():
        branch.lora_B.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(branch.index))
    adapter = tmp_path_factory.mktemp("adapter")
    save_adapter(base, adapter)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 128, (20,), generator=generator).tolist() for _ in range(12)]
    examples = [Example(row, [*row[1:], IGNORE_INDEX], "test") for row in rows]
    batches = eval_batches(examples, micro_batch=2, seq_len=64, packing=True, pad_id=0)
    return base, adapter, evaluate(base, batches, 512).loss, examples


def test_merged_model_passes_in_a_fresh_process(trained, tmp_path):
    base, adapter, loss, examples = trained
    merge_model(base.folder, adapter, tmp_path / "m")
    proof = prove(tmp_path / "m", loss, examples)
    assert proof.passed
    assert proof.tokens == 12 * 19


@pytest.mark.parametrize("fault", ["scale ignored", "a layer skipped", "adapter empty"])
def test_planted_fault_is_caught(fault, trained, tmp_path):
    base, adapter, loss, examples = trained
    merge_model(base.folder, adapter, tmp_path / "m", dtype="float32")
    path = tmp_path / "m" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    with torch.no_grad():
        for name, branch in branches(base).items():
            update = branch.scale * (branch.lora_B.float() @ branch.lora_A.float())
            if fault == "scale ignored":
                tensors[f"{name}.weight"] -= update * (1 - 1 / branch.scale)
            elif fault == "adapter empty" or "layers.0" in name:
                tensors[f"{name}.weight"] -= update
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match="do not use it"):
        prove(tmp_path / "m", loss, examples)


def test_folder_that_transformers_cannot_load_is_reported(trained, tmp_path):
    with pytest.raises(ModelError, match="plain transformers cannot load"):
        prove(tmp_path, trained[2], trained[3])
