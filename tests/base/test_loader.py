"""The loader builds exactly what transformers builds, and refuses files that are not exactly the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import load_base
from qlora_kit.base.shards import Shards, find_shards
from qlora_kit.base.source import fingerprint
from qlora_kit.errors import ModelError
from qlora_kit.recipe import Model
from tests.edits import edited


def unquantized(folder: Path, dtype: str = "float32") -> Model:
    return Model(path=str(folder), quantization="none", dtype=dtype)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_unquantized_logits_are_bit_identical_to_transformers(model_type, tiny_model, ids):
    folder = tiny_model(model_type)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = load_base(unquantized(folder)).model(input_ids=ids).logits
        assert torch.equal(ours, reference(input_ids=ids).logits)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_parameter_is_frozen_and_none_is_left_on_meta(model_type, tiny_model):
    model = load_base(Model(path=str(tiny_model(model_type)))).model
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.requires_grad or tensor.is_meta for tensor in tensors)


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def test_missing_tensor_is_named(tiny_model, tmp_path):
    folder = edited(tiny_model("llama"), tmp_path / "m", lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(ModelError, match=rf"'{Q_PROJ}' is missing"):
        load_base(unquantized(folder))


def test_unexpected_tensor_is_named(tiny_model, tmp_path):
    folder = edited(tiny_model("llama"), tmp_path / "m", lambda t: t.update({"model.extra": torch.zeros(1)}))
    with pytest.raises(ModelError, match=r"'model.extra' is unexpected"):
        load_base(unquantized(folder))


def test_wrong_shape_is_named_with_both_shapes(tiny_model, tmp_path):
    folder = edited(tiny_model("llama"), tmp_path / "m", lambda t: t.update({Q_PROJ: torch.zeros(64, 32)}))
    with pytest.raises(ModelError, match=r"q_proj.weight: shape \[64, 32\], the config asks for \[64, 64\]"):
        load_base(unquantized(folder))


def test_names_without_the_model_prefix_are_understood(tiny_model, tmp_path, ids):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    folder = edited(tiny_model("gpt2"), tmp_path / "m", strip)
    with torch.no_grad():
        expected = load_base(unquantized(tiny_model("gpt2"))).model(input_ids=ids).logits
        assert torch.equal(load_base(unquantized(folder)).model(input_ids=ids).logits, expected)


def test_config_cannot_ask_for_remote_code(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "_attn_implementation": "owner/kernel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert type(load_base(unquantized(folder)).model).__module__.startswith("transformers.")


def test_already_quantized_model_is_refused_with_its_method(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="already quantized \\(gptq\\)"):
        load_base(unquantized(folder))


def test_fingerprint_tells_a_finetuned_copy_apart(tiny_model, tmp_path):
    base = tiny_model("llama")
    copy = edited(base, tmp_path / "m", lambda t: t.update({k: v * 1.0001 for k, v in t.items()}))
    assert fingerprint(Shards(find_shards(base))) != fingerprint(Shards(find_shards(copy)))
