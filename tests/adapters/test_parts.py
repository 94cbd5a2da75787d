"""Adapters that PEFT made run here with PEFT's logits, merge to PEFT's merged model, and train on as its kin do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.adapters.inject import activate, merge, unmerge
from qlora_kit.adapters.store import load_adapter, read_adapter, save_adapter
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import Base, load_base
from qlora_kit.base.quantize_model import quantize_model
from qlora_kit.base.streaming import Placement
from qlora_kit.errors import ModelError
from qlora_kit.recipe import Model
from qlora_kit.training.blocks import attach
from tests.peft_adapters import KINDS, added_tokens, kinds, logits, made_by_peft


def base_of(folder: Path, placement: Placement | None = None, **settings: Any) -> Base:
    model = Model(path=str(folder), **{"quantization": "none", "dtype": "float32", **settings})
    return load_base(model, placement=placement)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied tables; what it makes of them is what is compared
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_peft_adapter_gives_pefts_logits_here(model_type, kind, tiny_model, tmp_path, ids):
    folder = tiny_model(model_type)
    theirs = made_by_peft(folder, model_type, tmp_path, **kinds(model_type)[kind])
    ours = base_of(folder)
    plain = logits(ours.model, ids)
    load_adapter(ours, tmp_path)
    assert_close(logits(ours.model, ids), logits(theirs, ids))
    assert not torch.allclose(logits(ours.model, ids), plain, atol=1e-3)
    activate(ours, [])
    assert torch.equal(logits(ours.model, ids), plain)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
def test_dora_on_a_4_bit_base_is_pefts_on_the_same_weights_dequantized(model_type, tiny_model, tmp_path, ids):
    folder = tiny_model(model_type)
    ours = base_of(folder, quantization="nf4")
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, linear in ours.linears().items():
            weight = linear.base_weight().t() if ARCHITECTURES[model_type].transposed else linear.base_weight()
            dense.get_parameter(f"{name}.weight").copy_(weight)
    dense.save_pretrained(tmp_path / "dense")
    theirs = made_by_peft(tmp_path / "dense", model_type, tmp_path / "a", **kinds(model_type)["dora"])
    load_adapter(ours, tmp_path / "a")
    live = logits(ours.model, ids)
    assert_close(live, logits(theirs, ids))
    merge(ours)
    assert_close(logits(ours.model, ids), live)
    unmerge(ours)
    assert torch.equal(logits(ours.model, ids), live)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["some layers", "dora", "embedding saved"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_on_a_4_bit_checkpoint_of_transformers_peft_and_this_kit_agree(model_type, kind, tiny_model, tmp_path, ids):
    """One adapter on one NF4 checkpoint: peft + transformers + bitsandbytes, and here."""
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    quantized = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **settings), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(tiny_model(model_type), **quantized).save_pretrained(tmp_path / "q")
    made_by_peft(tiny_model(model_type), model_type, tmp_path / "a", **kinds(model_type)[kind])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    for module in theirs.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.train()  # its inference kernel rounds absmax to bf16
    ours = base_of(tmp_path / "q")
    load_adapter(ours, tmp_path / "a")
    assert_close(logits(ours.model, ids), logits(theirs, ids))


def test_dora_on_streamed_blocks_is_dora_on_resident_ones(tiny_model, tmp_path, ids):
    folder, found = tiny_model("llama"), []
    quantize_model(folder, tmp_path / "q")
    made_by_peft(folder, "llama", tmp_path / "a", **kinds("llama")["dora"])
    for placement in (Placement(), Placement("disk")):
        base = load_base(Model(path=str(tmp_path / "q")), placement=placement)
        attach(base)
        load_adapter(base, tmp_path / "a")
        found.append(logits(base.model, ids))
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["embedding saved", "LoRA on both", "token rows", "DoRA on head"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_tables_that_are_fetched_from_disk_change_too(model_type, kind, tiny_model, tmp_path, ids):
    folder = tiny_model(model_type)
    made_by_peft(folder, model_type, tmp_path, **kinds(model_type)[kind])
    found = []
    for embeddings in ("device", "disk"):
        base = base_of(folder, Placement("disk", 0, embeddings))
        attach(base)
        plain = logits(base.model, ids)
        load_adapter(base, tmp_path)
        found.append(logits(base.model, ids))
        activate(base, [])
        assert torch.equal(logits(base.model, ids), plain)
    assert torch.equal(*found)
    assert not torch.allclose(found[0], plain, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("embeddings", ["device", "disk"])
def test_added_tokens_come_with_the_adapter(embeddings, model_type, tiny_model, tmp_path):
    folder, ids = tiny_model(model_type), torch.tensor([[5, 128, 131, 7]])
    theirs = added_tokens(folder, model_type, tmp_path)
    ours = base_of(folder, Placement(embeddings=embeddings))
    load_adapter(ours, tmp_path)
    assert logits(ours.model, ids).shape[-1] == 132
    assert_close(logits(ours.model, ids), logits(theirs, ids))
    activate(ours, [])
    assert logits(ours.model, ids[:, :1]).shape[-1] == 128


# ------------------------------------------------------------------------------------- several, and what is refused


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_added_up_is_refused_and_what_can_is_added(tiny_model, tmp_path, ids):
    folder, base = tiny_model("llama"), base_of(tiny_model("llama"))
    for kind in ("dora", "embedding saved", "head and norms saved", "LoRA on both"):
        made_by_peft(folder, "llama", tmp_path / kind, **kinds("llama")[kind])
        load_adapter(base, tmp_path / kind, kind)
    with pytest.raises(ModelError, match="a DoRA adapter works alone"):
        activate(base, ["dora", "embedding saved"])
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight: more than one of the adapters .* replaces it"):
        activate(base, ["embedding saved", "LoRA on both"])
    activate(base, ["embedding saved", "head and norms saved"])
    both = logits(base.model, ids)
    for alone in ("embedding saved", "head and norms saved"):
        activate(base, [alone])
        assert not torch.allclose(logits(base.model, ids), both, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dora", "embedding saved", "biases"])
def test_more_than_plain_lora_is_refused_where_only_that_can_be_used(kind, tiny_model, tmp_path):
    folder = tiny_model("qwen2")
    made_by_peft(folder, "qwen2", tmp_path, **kinds("qwen2")[kind])
    base = base_of(folder)
    linears = {name: (linear.out_features, linear.in_features) for name, linear in base.linears().items()}
    with pytest.raises(ModelError, match="use_dora|belongs to no linear"):
        read_adapter(tmp_path, linears, folder)
    load_adapter(base, tmp_path)
    with pytest.raises(ModelError, match="only what was trained here is written"):
        save_adapter(base, tmp_path / "again")


DAMAGES = {
    "DoRA without magnitudes": ("dora", lambda t, c: t.pop(next(k for k in t if "magnitude" in k)), "is missing"),
    "magnitudes without DoRA": ("dora", lambda t, c: c.update(use_dora=False), "use_dora is False"),
    "half an embedding": ("LoRA on embedding", lambda t, c: t.pop(EMBED + "lora_embedding_A"), "lora_embedding_A and"),
    "ids that do not exist": ("token rows", lambda t, c: c.update(trainable_token_indices=[5, 128]), "each below 128"),
    "too few ids": ("token rows", lambda t, c: c.update(trainable_token_indices=[5]), "the ids of the 2 rows"),
    "head of another width": (
        "head and norms saved",
        lambda t, c: t.update({HEAD: torch.zeros(128, 60)}),
        r"lm_head.weight: shape \[128, 60\], this base takes \[128, 64\]",
    ),
    "head with fewer rows": ("head and norms saved", lambda t, c: t.update({HEAD: torch.zeros(120, 64)}), "this base"),
    "a module that is not there": ("head and norms saved", lambda t, c: t.pop(HEAD), "modules_to_save names 'lm_head'"),
    "a linear trained whole": (
        "head and norms saved",
        lambda t, c: t.update({"base_model.model.model.layers.0.mlp.up_proj.weight": torch.zeros(96, 64)}),
        "belongs to no linear",
    ),
    "PiSSA": ("some layers", lambda t, c: c.update(init_lora_weights="pissa_niter_4"), "changes the base's weights"),
    "a bias of the branch": ("some layers", lambda t, c: c.update(lora_bias=True), "lora_bias"),
}
EMBED, HEAD = "base_model.model.model.embed_tokens.", "base_model.model.lm_head.weight"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_unknown_adapters_are_refused_by_name(damage, tiny_model, tmp_path):
    kind, edit, message = DAMAGES[damage]
    folder = tiny_model("llama")
    made_by_peft(folder, "llama", tmp_path, **kinds("llama")[kind])
    weights, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, config = safetensors.torch.load_file(weights), json.loads(settings.read_text())
    edit(tensors, config)
    safetensors.torch.save_file(tensors, weights)
    settings.write_text(json.dumps(config))
    base = base_of(folder)
    with pytest.raises(ModelError, match=message):
        load_adapter(base, tmp_path)
    assert base.updates == {}
