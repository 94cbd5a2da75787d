"""Adapters go to PEFT and come back; what does not fit is refused by name. PEFT is the reference."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.inject import branches, inject
from qlora_kit.adapters.store import load_adapter, save_adapter
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import Base, load_base
from qlora_kit.errors import ModelError
from qlora_kit.recipe import Adapter, Model


def base_of(folder: Path) -> Base:
    return load_base(Model(path=str(folder), quantization="none", dtype="float32"))


def random_adapter(folder: Path, **settings: object) -> Base:
    """A base with an adapter whose B is not zero."""
    base = base_of(folder)
    inject(base, Adapter(**{"rank": 4, "alpha": 6, "dtype": "float32", **settings}), seed=0)
    for index, branch in enumerate(branches(base).values()):
        branch.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(index))
    base.model.eval()
    return base


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_our_adapter_gives_the_same_logits_in_peft(model_type, tiny_model, tmp_path, ids):
    folder = tiny_model(model_type)
    ours = random_adapter(folder)
    save_adapter(ours, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(logits(theirs, ids), logits(ours.model, ids), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(logits(ours.model, ids), logits(base_of(folder).model, ids), atol=1e-2)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_peft_adapter_gives_the_same_logits_here(model_type, rslora, tiny_model, tmp_path, ids):
    folder = tiny_model(model_type)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        use_rslora=rslora,
        init_lora_weights=False,
        fan_in_fan_out=ARCHITECTURES[model_type].transposed,
    )
    theirs = peft.get_peft_model(plain, config).eval()
    theirs.save_pretrained(tmp_path)
    ours = base_of(folder)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours.model, ids), logits(theirs, ids), atol=2e-5, rtol=1e-5)


def test_peft_patterns_of_rank_and_alpha_are_understood(tiny_model, tmp_path, ids):
    folder = tiny_model("llama")
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"q_proj": 32},
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = base_of(folder)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours.model, ids), logits(theirs, ids), atol=2e-5, rtol=1e-5)
    save_adapter(ours, tmp_path / "again")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "again").eval()
    torch.testing.assert_close(logits(again, ids), logits(ours.model, ids), atol=2e-5, rtol=1e-5)


def saved(tiny_model, tmp_path: Path) -> tuple[Path, Path]:
    folder = tiny_model("llama")
    save_adapter(random_adapter(folder), tmp_path / "adapter")
    return folder, tmp_path / "adapter"


def rewrite(adapter: Path, edit) -> None:
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, adapter / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGES = {
    "belongs to no linear": lambda t: t.update({KEY.replace("layers.0", "layers.9"): t[KEY].clone()}),
    "only lora_B is there": lambda t: t.pop(KEY),
    "this base takes": lambda t: t.update({KEY: torch.zeros(4, 63)}),
    "NaN or infinity": lambda t: t[KEY].fill_(float("nan")),
    "adapter is empty": lambda t: t.clear(),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_adapter_is_refused(message, tiny_model, tmp_path):
    folder, adapter = saved(tiny_model, tmp_path)
    rewrite(adapter, DAMAGES[message])
    with pytest.raises(ModelError, match=message):
        load_adapter(base_of(folder), adapter)


def test_adapter_of_another_base_is_refused_unless_told(tiny_model, tmp_path):
    _, adapter = saved(tiny_model, tmp_path)
    other = base_of(tiny_model("llama", rms_norm_eps=1e-5, initializer_range=0.03))
    with pytest.raises(ModelError, match="trained on base"):
        load_adapter(other, adapter)
    load_adapter(other, adapter, any_base=True)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"peft_type": "IA3"}, {"modules_to_save": ["lm_head"]}])
def test_other_kinds_of_adapter_are_refused_by_field(change, tiny_model, tmp_path):
    folder, adapter = saved(tiny_model, tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=next(iter(change))):
        load_adapter(base_of(folder), adapter)
