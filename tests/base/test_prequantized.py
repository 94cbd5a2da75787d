"""4-bit checkpoints: this kit and plain transformers read the same weights from the same files, whoever wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.adapters.inject import inject, trainable_parameters
from qlora_kit.adapters.store import save_adapter
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base import nf4, prequantized
from qlora_kit.base.loader import load_base
from qlora_kit.base.quantize_model import quantize_model
from qlora_kit.base.shards import Shards, save_tensors
from qlora_kit.errors import ModelError
from qlora_kit.export.merge import merge_model
from qlora_kit.recipe import Adapter, Model
from tests.edits import edited

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
STATE = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"


def transformers_model(folder: Path, **options: Any) -> Any:
    """As plain transformers loads it, without bitsandbytes' inference kernels, which round absmax to bf16."""
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.train()
    return model


def assert_same_model(folder: Path, reference: Any, ids: torch.Tensor) -> None:
    """Every dequantized weight bit-equal, every logit too."""
    base = load_base(Model(path=str(folder)))
    linears, compared = base.linears(), 0
    for name, module in reference.named_modules():
        if isinstance(module, bnb.nn.Linear4bit) and name in linears:
            expected = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(linears[name].base_weight(), expected)
            compared += 1
    assert compared == sum(linear.quantization != "none" for linear in linears.values()) > 0
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, reference(input_ids=ids).logits)


def by_transformers(source: Path, folder: Path, **options: Any) -> Path:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_our_checkpoint_gives_transformers_the_same_logits(model_type, tiny_model, ids, tmp_path):
    quantize_model(tiny_model(model_type), tmp_path / "q")
    assert_same_model(tmp_path / "q", transformers_model(tmp_path / "q"), ids)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_checkpoints_that_transformers_made_load(model_type, tiny_model, ids, tmp_path):
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    folder = by_transformers(tiny_model(model_type), tmp_path / "q", **options)
    assert_same_model(folder, transformers_model(folder), ids)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_both_types_with_and_without_double_quantization(
    quant_type, double_quant, model_type, tiny_model, ids, tmp_path
):
    options = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double_quant}
    folder = by_transformers(tiny_model(model_type), tmp_path / "q", **options)
    assert_same_model(folder, transformers_model(folder), ids)
    quantize_model(tiny_model(model_type), tmp_path / "ours", quant_type=quant_type, double_quant=double_quant)
    assert_same_model(tmp_path / "ours", transformers_model(tmp_path / "ours"), ids)


@pytest.mark.parametrize("skipped", [["lm_head", "model.layers.0.mlp", "k_proj"], ["lm_head", "model.layers.1"]])
def test_modules_left_unquantized_stay_dense(skipped, tiny_model, ids, tmp_path):
    options = {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": skipped}
    folder = by_transformers(tiny_model("llama"), tmp_path / "q", **options)
    assert_same_model(folder, transformers_model(folder), ids)
    dense = [name for name, linear in load_base(Model(path=str(folder))).linears().items() if "dense" in linear.stored]
    assert dense == [name for name in dense if any(part in name for part in skipped)] != []


def test_unquantized_conv1d_layers_stay_dense(tiny_model, ids, tmp_path):
    folder = by_transformers(tiny_model("gpt2"), tmp_path / "q", llm_int8_skip_modules=["lm_head", "attn.c_proj"])
    assert_same_model(folder, transformers_model(folder), ids)


def test_a_quantized_head_is_dequantized(tiny_model, ids, tmp_path):
    options = {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["k_proj"]}
    folder = by_transformers(tiny_model("llama"), tmp_path / "q", **options)
    assert_same_model(folder, transformers_model(folder), ids)


def test_a_checkpoint_gives_the_same_base_as_quantizing_when_loading(tiny_model, tmp_path):
    quantize_model(tiny_model("qwen2"), tmp_path / "q")
    loaded, packed = (load_base(Model(path=str(path))) for path in (tiny_model("qwen2"), tmp_path / "q"))
    for (name, expected), (same_name, found) in zip(
        loaded.model.state_dict().items(), packed.model.state_dict().items()
    ):
        assert (name, expected.dtype) == (same_name, found.dtype)
        assert torch.equal(expected, found)


def test_settings_say_what_the_checkpoint_is(tiny_model, tmp_path, capsys):
    quantize_model(tiny_model("llama"), tmp_path / "q", quant_type="fp4", double_quant=False)
    settings = load_base(Model(path=str(tmp_path / "q"))).settings
    assert (settings.quantization, settings.double_quant) == ("fp4", False)
    assert "model.quantization is fp4 in this checkpoint; nf4 is not used" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- files of other making


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "q"
    quantize_model(tiny_model("llama"), folder)
    return folder


def with_state(**changes: Any):
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        state = json.loads(tensors[STATE].numpy().tobytes()) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return edit


def test_blocks_of_another_size_load(checkpoint, ids, tmp_path):
    def edit(tensors):
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
        codes, state = bnb.functional.quantize_4bit(weight, blocksize=256, quant_type="nf4", compress_statistics=True)
        parts = {f"{Q_PROJ}.{name}": value for name, value in state.as_dict(packed=True).items()}
        tensors.update({Q_PROJ: codes} | parts)

    folder = edited(checkpoint, tmp_path / "m", edit)
    assert_same_model(folder, transformers_model(folder), ids)


def test_another_table_of_absmax_codes_is_used(checkpoint, ids, tmp_path):
    def edit(tensors):
        tensors[f"{Q_PROJ}.nested_quant_map"] = tensors[f"{Q_PROJ}.nested_quant_map"] * 1.01

    folder = edited(checkpoint, tmp_path / "m", edit)
    assert_same_model(folder, transformers_model(folder), ids)
    assert "absmax_code" in load_base(Model(path=str(folder))).linears()[Q_PROJ.removesuffix(".weight")].stored


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.absmax"), r"'model.layers.1.self_attn.q_proj.weight.absmax' is missing"),
        (lambda t: t.pop(Q_PROJ), r"belongs to 'model.layers.1.self_attn.q_proj.weight', which is missing"),
        (lambda t: t.pop(STATE), r"q_proj.weight: shape \[2048, 1\], the config asks for \[64, 64\]"),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1].clone()}),
            r"codes is torch.uint8 \[2047, 1\], expected .* \[2048, 1\]",
        ),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ].view(-1).view(torch.bfloat16)[:, None]}),
            r"bfloat16 \(bnb_4bit_quant_storage\); only uint8",
        ),
        (lambda t: t.update({f"{Q_PROJ}.quant_map": torch.zeros(16)}), r"quant_map: not the levels of nf4"),
        (lambda t: t.update({f"{Q_PROJ}.nested_quant_map": torch.full((256,), torch.nan)}), "expected 256 finite"),
        (with_state(shape=[32, 128]), r"shape \[32, 128\], the config asks for \[64, 64\]"),
        (with_state(blocksize=48), "not a valid quantization state: .*blocksize: 48"),
        (with_state(nested_offset="NaN"), "not a valid quantization state"),
        (with_state(nested_blocksize=128), "nested_blocksize: 128"),
        (with_state(quant_type="fp4"), "quant_type: 'fp4'"),
        (lambda t: t.update({STATE: torch.zeros(9000, dtype=torch.uint8)}), "9000 bytes"),
        (lambda t: t.update({STATE: torch.zeros(90, dtype=torch.uint8)}), "not a valid quantization state"),
    ],
)
def test_damaged_checkpoints_are_refused(edit, message, checkpoint, tmp_path):
    with pytest.raises(ModelError, match=message):
        load_base(Model(path=str(edited(checkpoint, tmp_path / "m", edit))))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq"}, r"already quantized \(awq\)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
        ([], "expected an object"),
    ],
)
def test_other_quantization_methods_are_refused(quantization, message, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_base(Model(path=str(folder)))


def test_loading_makes_no_copy_and_dequantizes_nothing(checkpoint, monkeypatch):
    monkeypatch.setattr(nf4, "dequantize", lambda *a, **k: pytest.fail("dequantized"))
    monkeypatch.setattr(nf4, "quantize", lambda *a, **k: pytest.fail("quantized"))
    linear = load_base(Model(path=str(checkpoint))).linears()[Q_PROJ.removesuffix(".weight")]
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert torch.equal(linear.codes, file.get_tensor(Q_PROJ))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_merging_onto_a_checkpoint_equals_merging_onto_the_dequantized_original(model_type, tiny_model, tmp_path):
    source = tiny_model(model_type)
    quantize_model(source, tmp_path / "q")
    base = load_base(Model(path=str(tmp_path / "q")))
    inject(base, Adapter(rank=2), seed=0)
    for _, parameter in trainable_parameters(base):
        parameter.data.normal_(generator=torch.Generator().manual_seed(5))
    save_adapter(base, tmp_path / "a")
    for model, out in ((source, "expected"), (tmp_path / "q", "found")):
        merge_model(model, tmp_path / "a", tmp_path / out, dtype="float32")
    expected, found = (load_file(tmp_path / out / "model.safetensors") for out in ("expected", "found"))
    linears = [f"{name}.weight" for name in base.linears()]
    assert all(torch.equal(expected[name], found[name]) for name in linears)
    assert {name: tuple(value.shape) for name, value in expected.items()} == {
        name: tuple(value.shape) for name, value in found.items()
    }
    with pytest.raises(ModelError, match="no original weights"):
        merge_model(tmp_path / "q", tmp_path / "a", tmp_path / "no", onto="original")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block", [64, 128])
def test_rows_of_a_weight_are_those_of_the_whole(double_quant, block, tmp_path):
    shape = (6, 256) if block == 64 else (6, 192)  # of 192 columns two rows share a block of 128
    functional = nf4.bitsandbytes_functional()
    codes, state = functional.quantize_4bit(
        torch.randn(shape), blocksize=block, quant_type="nf4", compress_statistics=double_quant
    )
    stored = {"w.weight": codes} | {f"w.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    save_tensors(tmp_path / "model.safetensors", stored)
    shards, offset = Shards([tmp_path / "model.safetensors"]), state.offset.item() if double_quant else None
    packed = prequantized.PackedWeight("w.weight", "nf4", block, shape, offset)
    rows, whole = packed.rows(shards, torch.bfloat16), packed.dequantize(shards, torch.bfloat16)
    if block == 128:
        assert rows is None
    else:
        assert torch.equal(torch.cat([rows(0, 1), rows(1, 4), rows(4, 6)]), whole)
