"""Merged weights are the base plus the update, rounded once; the folder is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.inject import branches, inject
from qlora_kit.adapters.store import save_adapter
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import Base, load_base
from qlora_kit.errors import ModelError, NonFiniteError
from qlora_kit.export import merge as module
from qlora_kit.export.merge import merge_model, merged_tensors, open_merge
from qlora_kit.recipe import Adapter, Model


def adapted(folder: Path, adapter: Path, quantization: str = "none", dtype: str = "float32") -> Base:
    """A base with an adapter whose B is not zero, the adapter saved."""
    base = load_base(Model(path=str(folder), quantization=quantization, dtype=dtype))
    inject(base, Adapter(rank=4, alpha=6, dtype="float32"), seed=0)
    for branch in branches(base).values():
        branch.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(branch.index))
    base.model.eval()
    save_adapter(base, adapter)
    return base


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_reloaded_merged_model_has_the_adapters_logits(model_type, tiny_model, tmp_path, ids):
    base = adapted(tiny_model(model_type), tmp_path / "a")
    merge_model(base.folder, tmp_path / "a", tmp_path / "m", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged, ids), logits(base.model, ids), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
def test_merge_onto_the_dequantized_base_is_what_was_trained_beside(model_type, tiny_model, tmp_path, ids):
    base = adapted(tiny_model(model_type), tmp_path / "a", quantization="nf4")
    report = merge_model(base.folder, tmp_path / "a", tmp_path / "m", dtype="float32")
    assert report.onto == "dequantized"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged, ids), logits(base.model, ids), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_element_is_the_exact_sum_correctly_rounded(model_type, dtype, tiny_model, tmp_path):
    base = adapted(tiny_model(model_type, torch.bfloat16), tmp_path / "a")
    merged = open_merge(base.folder, tmp_path / "a", dtype=dtype)
    wrong = total = 0
    for name, value in merged_tensors(base.folder, tmp_path / "a", dtype=dtype):
        branch = branches(base).get(merged.linear(name))
        exact = merged.weights.read(name).double()
        if branch is not None:
            update = branch.scale * (branch.lora_B.double() @ branch.lora_A.double())
            exact += update.t() if base.architecture.transposed else update
        nearest = exact.to(getattr(torch, dtype))
        # What torch rounds twice is left out of the count where it is as near as ours.
        further = (value.double() - exact).abs() > (nearest.double() - exact).abs()
        wrong += int(further.sum())
        total += exact.numel()
    assert total > 40_000
    assert wrong <= 1e-5 * total


def test_a_tensor_in_many_tiles_is_the_tensor_in_one(tiny_model, tmp_path, monkeypatch):
    base = adapted(tiny_model("gpt2"), tmp_path / "a", quantization="nf4")
    whole = dict(merged_tensors(base.folder, tmp_path / "a"))
    monkeypatch.setattr(module, "TILE", 1000)
    for name, value in merged_tensors(base.folder, tmp_path / "a"):
        assert torch.equal(value, whole[name]), name


def test_equals_pefts_own_merge(tiny_model, tmp_path):
    base = adapted(tiny_model("llama"), tmp_path / "a")
    merge_model(base.folder, tmp_path / "a", tmp_path / "m", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a").merge_and_unload().state_dict()
    for name, value in safetensors.torch.load_file(tmp_path / "m" / "model.safetensors").items():
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=1e-6)


def test_untargeted_tensors_are_carried_bit_for_bit(tiny_model, tmp_path):
    base = adapted(tiny_model("llama"), tmp_path / "a")
    merge_model(base.folder, tmp_path / "a", tmp_path / "m", dtype="float32", onto="original")
    before, after = (safetensors.torch.load_file(f / "model.safetensors") for f in (base.folder, tmp_path / "m"))
    targets = {f"{name}.weight" for name in branches(base)}
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in targets)


def test_shards_keep_their_names_and_the_index_its_map(tiny_model, tmp_path, ids):
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_model("llama")).save_pretrained(sharded, max_shard_size="100KB")
    base = adapted(sharded, tmp_path / "a")
    merge_model(sharded, tmp_path / "a", tmp_path / "m", dtype="float32")
    index = "model.safetensors.index.json"
    maps = [json.loads((folder / index).read_text())["weight_map"] for folder in (sharded, tmp_path / "m")]
    assert maps[0] == maps[1]
    assert len(set(maps[0].values())) > 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged, ids), logits(base.model, ids), atol=2e-5, rtol=1e-5)


def test_fp16_overflow_is_named_and_nothing_is_written(tiny_model, tmp_path):
    adapted(tiny_model("llama"), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = next(name for name in tensors if "v_proj.lora_B" in name)
    tensors[name].fill_(3e5)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(NonFiniteError, match=r"v_proj.weight' reaches .* outside torch.float16"):
        merge_model(tiny_model("llama"), tmp_path / "a", tmp_path / "m")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a"}


def test_adapter_of_another_base_is_refused(tiny_model, tmp_path):
    adapted(tiny_model("llama"), tmp_path / "a")
    other = tiny_model("llama", rms_norm_eps=1e-5, initializer_range=0.04)
    with pytest.raises(ModelError, match="trained on base"):
        merge_model(other, tmp_path / "a", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_dequantized_needs_a_record_of_the_quantization(tiny_model, tmp_path):
    base = adapted(tiny_model("llama"), tmp_path / "a")
    with pytest.raises(ModelError, match="merge with --onto original"):
        merge_model(base.folder, tmp_path / "a", tmp_path / "m", onto="dequantized")
