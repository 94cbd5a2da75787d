"""`qlora-kit quantize`: what it writes, what it carries along, and what it refuses."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qlora_kit.adapters.inject import inject
from qlora_kit.adapters.store import load_adapter, save_adapter
from qlora_kit.base import quantize_model as module
from qlora_kit.base.loader import load_base
from qlora_kit.base.quantize_model import quantize_model
from qlora_kit.cli import app
from qlora_kit.errors import DiskError, ModelError, NonFiniteError
from qlora_kit.recipe import Adapter, Model


def header(path: Path) -> dict:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def test_shards_hold_what_one_file_would_and_transformers_finds_them(tiny_model, ids, tmp_path, monkeypatch):
    source = tiny_model("phi3")
    quantize_model(source, tmp_path / "one")
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    quantize_model(source, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    with torch.no_grad():  # in training mode: bitsandbytes' inference kernel takes no width of 96
        models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).train() for name in ("one", "many")]
        logits = [model(input_ids=ids).logits for model in models]
    assert torch.equal(*logits)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "llama"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_tensor_is_aligned_to_its_dtype(double_quant, model_type, tiny_model, tmp_path):
    source = tiny_model(model_type, **({"vocab_size": 129} if model_type == "gpt2" else {}))
    quantize_model(source, tmp_path / "q", double_quant=double_quant)
    sizes = {"F32": 4, "BF16": 2, "U8": 1}
    entries = header(tmp_path / "q" / "model.safetensors")
    assert all(e["data_offsets"][0] % sizes[e["dtype"]] == 0 for name, e in entries.items() if name != "__metadata__")


def test_names_without_the_model_prefix_are_understood_by_both(tiny_model, tmp_path, ids):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny_model("gpt2") / "config.json").read_bytes())
    tensors = load_file(tiny_model("gpt2") / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(4)  # a computed buffer of old files
    save_file({name.removeprefix("transformer."): value for name, value in tensors.items()}, bare / "model.safetensors")
    quantize_model(bare, tmp_path / "q")
    quantize_model(tiny_model("gpt2"), tmp_path / "expected")
    with torch.no_grad():
        ours = [load_base(Model(path=str(tmp_path / name))).model(input_ids=ids).logits for name in ("q", "expected")]
        theirs = [
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(input_ids=ids).logits for name in ("q", "expected")
        ]
    assert torch.equal(*ours) and torch.equal(*theirs)


def test_tokenizer_template_and_generation_settings_come_along(tiny_model, tmp_path):
    source = tmp_path / "m"
    source.mkdir()
    for path in tiny_model("llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("not needed")
    quantize_model(source, tmp_path / "q")
    found = {path.name for path in (tmp_path / "q").iterdir()}
    carried = {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert found == {"config.json", "model.safetensors"} | carried


def test_an_adapter_fits_original_and_checkpoint(tiny_model, tmp_path):
    quantize_model(tiny_model("llama"), tmp_path / "q")
    original, checkpoint = str(tiny_model("llama")), str(tmp_path / "q")
    for trained_on, used_on in ((original, checkpoint), (checkpoint, original)):
        base = load_base(Model(path=trained_on))
        inject(base, Adapter(rank=2), seed=0)
        folder = tmp_path / f"adapter-{trained_on == original}"
        save_adapter(base, folder)
        load_adapter(load_base(Model(path=used_on)), folder)


def test_weights_are_rounded_to_the_dtype_of_computation_first(tiny_model, tmp_path):
    quantize_model(tiny_model("llama"), tmp_path / "half", dtype="float16")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (config["dtype"], config["quantization_config"]["bnb_4bit_compute_dtype"]) == ("float16", "float16")
    loaded, packed = (load_base(Model(path=str(p), dtype="float16")) for p in (tiny_model("llama"), tmp_path / "half"))
    for name, linear in loaded.linears().items():
        assert torch.equal(linear.codes, packed.linears()[name].codes)


def broken(tiny_model, folder: Path, value: float) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model("llama") / "config.json").read_bytes())
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_weight_that_is_not_finite_leaves_nothing_behind(value, tiny_model, tmp_path):
    with pytest.raises(NonFiniteError, match=r"up_proj.weight"):
        quantize_model(broken(tiny_model, tmp_path / "m", value), tmp_path / "q", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_checkpoint_is_not_quantized_again_and_nothing_is_overwritten(tiny_model, tmp_path):
    quantize_model(tiny_model("llama"), tmp_path / "q")
    with pytest.raises(ModelError, match="already quantized; give the original"):
        quantize_model(tmp_path / "q", tmp_path / "again")
    with pytest.raises(DiskError, match="already exists"):
        quantize_model(tiny_model("llama"), tmp_path / "q")


def test_the_command_prints_one_json_object(tiny_model, tmp_path):
    arguments = [
        "quantize",
        "--model",
        str(tiny_model("llama")),
        "--out",
        str(tmp_path / "q"),
        "--no-double-quant",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    report = json.loads(result.stdout)
    assert (report["quantized_tensors"], report["double_quant"], report["quant_type"]) == (14, False, "nf4")
    assert report["bytes_written"] <= (tmp_path / "q" / "model.safetensors").stat().st_size
