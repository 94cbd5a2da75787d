"""Merged, PEFT's adapters of every kind give PEFT's logits in plain transformers; tables are untied only if need be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.updates import TensorUpdate
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.errors import ModelError
from qlora_kit.export.audit import audit
from qlora_kit.export.merge import merge_model, open_merge
from qlora_kit.export.output import write_merged
from tests.peft_adapters import KINDS, added_tokens, kinds, logits, made_by_peft

ON_TABLES = {"head and norms saved", "embedding saved", "LoRA on embedding", "LoRA on both", "DoRA on head"}


def merged(out: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied tables
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_merged_model_has_pefts_logits_and_is_untied_exactly_when_tables_differ(
    model_type, kind, tiny_model, tmp_path, ids
):
    folder = tiny_model(model_type)
    theirs = made_by_peft(folder, model_type, tmp_path / "a", **kinds(model_type)[kind])
    merge_model(folder, tmp_path / "a", tmp_path / "m", dtype="float32")
    ours, before = merged(tmp_path / "m"), merged(folder)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=3e-5, rtol=1e-5)
    assert ours.config.tie_word_embeddings == (before.config.tie_word_embeddings and kind not in ON_TABLES)
    tables = ours.get_input_embeddings().weight, ours.get_output_embeddings().weight
    assert torch.equal(*tables) == ours.config.tie_word_embeddings
    changed = json.loads((tmp_path / "m" / "merge_report.json").read_text())["merged_tensors"]
    assert changed > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
def test_added_tokens_make_the_merged_model_taller(model_type, tiny_model, tmp_path):
    folder, ids = tiny_model(model_type), torch.tensor([[5, 128, 131, 7]])
    theirs = added_tokens(folder, model_type, tmp_path / "a")
    merge_model(folder, tmp_path / "a", tmp_path / "m", dtype="float32")
    ours = merged(tmp_path / "m")
    assert ours.config.vocab_size == 132
    assert ours.config.tie_word_embeddings == merged(folder).config.tie_word_embeddings
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=3e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["LoRA on embedding", "token rows"])
def test_a_copy_of_a_tied_head_in_the_files_follows(kind, tiny_model, tmp_path, ids):
    folder, doubled = tiny_model("qwen2"), tmp_path / "base"
    merged(folder).save_pretrained(doubled)
    tensors = safetensors.torch.load_file(doubled / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, doubled / "model.safetensors", {"format": "pt"})
    made_by_peft(folder, "qwen2", tmp_path / "a", **kinds("qwen2")[kind])
    for base in (folder, doubled):
        merge_model(base, tmp_path / "a", tmp_path / f"m{base.name}", dtype="float32")
    one, two = (merged(tmp_path / f"m{base.name}") for base in (folder, doubled))
    assert torch.equal(logits(one, ids), logits(two, ids))
    assert one.config.tie_word_embeddings == two.config.tie_word_embeddings == (kind == "token rows")


def test_dora_is_merged_exactly(tiny_model, tmp_path):
    folder = tiny_model("llama")
    made_by_peft(folder, "llama", tmp_path / "a", **kinds("llama")["dora"])
    merge_model(folder, tmp_path / "a", tmp_path / "m", dtype="float32", onto="original")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a").merge_and_unload().state_dict()
    for name, value in safetensors.torch.load_file(tmp_path / "m" / "model.safetensors").items():
        torch.testing.assert_close(value.double(), theirs[name], atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_the_audit_passes_every_kind_and_sees_a_table_that_is_not_the_adapters(kind, model_type, tiny_model, tmp_path):
    folder = tiny_model(model_type)
    made_by_peft(folder, model_type, tmp_path / "a", **kinds(model_type)[kind])
    merge = open_merge(folder, tmp_path / "a", dtype="float16")
    write_merged(merge, tmp_path / "m")
    assert audit(tmp_path / "m", merge)["changed"] > 0
    path = tmp_path / "m" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = next((name for name in tensors if isinstance(merge.update(name), TensorUpdate)), None)
    tensors[name or next(name for name in tensors if merge.update(name) is not None)].mul_(1.01)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match="do not use it"):
        audit(tmp_path / "m", merge)
