"""A GGUF file is the model: llama.cpp and transformers compute the folder's logits from it.

llama.cpp (extra `llamacpp`) is the judge of names, fields, order of rows and rotary scaling, in fp32, where nothing is
rounded; its GELU alone goes through a table of fp16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit.adapters.store import load_adapter
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import load_base
from qlora_kit.base.quantize_model import quantize_model
from qlora_kit.errors import DiskError, ModelError, NonFiniteError, RecipeError
from qlora_kit.export import gguf_file
from qlora_kit.export.gguf import export_gguf, export_gguf_adapter
from qlora_kit.export.gguf_names import GGUF_ARCHITECTURES
from qlora_kit.export.merge import merge_model
from qlora_kit.recipe import Model
from tests.conftest import write_model
from tests.edits import edited
from tests.export.test_merge import adapted
from tests.export.toy import add_tokenizer
from tools.llama_cpp import LlamaCpp

VOCABULARY = 320
GELU = ("gemma2", "gemma3_text", "gpt2", "gpt_neox")
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5], "long_factor": [2.0] * 8}
VARIANTS = {
    "llama3 frequencies": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e4, **LLAMA3}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "longrope": (
        "phi3",
        {
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONGROPE},
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 512,
        },
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "not parallel": ("gpt_neox", {"use_parallel_residual": False}),
    "partly rotary": ("gpt_neox", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "local base": ("gemma3_text", {"num_hidden_layers": 7}),
}


@pytest.fixture(scope="module")
def toy(tiny_model):
    """`toy("llama", **changes)` -> a model's folder with a tokenizer."""

    def make(model_type: str, **changes: object) -> Path:
        return add_tokenizer(tiny_model(model_type, vocab_size=VOCABULARY, **changes))

    return make


@torch.no_grad()
def folder_logits(folder: Path, row: list[int], **options: object) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()
    return model(input_ids=torch.tensor([row])).logits[0].numpy()


def llama_cpp_log_probabilities(file: Path, row: list[int], lora: Path | None = None) -> np.ndarray:
    pytest.importorskip("xllamacpp")
    judge = LlamaCpp(file, lora)
    return np.stack([judge.log_probabilities(row[:count], VOCABULARY) for count in range(1, len(row) + 1)])


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = (GGUFReader(file).tensors for file in (one, other))
    assert [tensor.name for tensor in first] == [tensor.name for tensor in second] != []
    assert all(np.array_equal(a.data, b.data) for a, b in zip(first, second, strict=True))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).log_softmax(-1).numpy()


def tolerance(model_type: str) -> float:
    return 2e-3 if model_type in GELU else 5e-6


# ------------------------------------------------------------------------------------------------ the same model


def test_every_architecture_that_the_kit_trains_has_a_row():
    assert set(GGUF_ARCHITECTURES) == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_llama_cpp_computes_the_folders_logits(model_type, toy, tmp_path, ids):
    folder, row = toy(model_type), ids[0, :15].tolist()  # Mistral's small window ends at 16
    export_gguf(folder, tmp_path / "m.gguf", dtype="f32")
    found = llama_cpp_log_probabilities(tmp_path / "m.gguf", row)
    assert np.abs(found - log_softmax(folder_logits(folder, row))).max() < tolerance(model_type)


@pytest.mark.parametrize("name", VARIANTS)
def test_llama_cpp_computes_the_logits_of_every_variant(name, toy, tmp_path, ids):
    model_type, changes = VARIANTS[name]
    changes = {key: value if not isinstance(value, dict) else Hashable(value) for key, value in changes.items()}
    folder, row = toy(model_type, **changes), ids[0].tolist()
    export_gguf(folder, tmp_path / "m.gguf", dtype="f32")
    found = llama_cpp_log_probabilities(tmp_path / "m.gguf", row)
    assert np.abs(found - log_softmax(folder_logits(folder, row))).max() < tolerance(model_type)


class Hashable(dict):
    """A config's section as a part of the key that made models are kept by."""

    def __hash__(self) -> int:
        return hash(repr(self))

    def __lt__(self, other: object) -> bool:
        return repr(self) < repr(other)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"])
def test_transformers_reads_the_same_weights_back(model_type, toy, tmp_path, ids):
    folder, row = toy(model_type), ids[0].tolist()
    export_gguf(folder, tmp_path / "m.gguf", dtype="f32")
    # Its own reading of the fields lacks some (Qwen 3's head width); llama.cpp is the judge of those.
    options = {"gguf_file": "m.gguf", "config": AutoConfig.from_pretrained(folder)}
    if model_type == "mistral":  # which transformers takes for a llama, as llama.cpp does: equal within the window
        options, row = {"gguf_file": "m.gguf"}, row[:15]
    found = folder_logits(tmp_path, row, **options)
    np.testing.assert_allclose(found, folder_logits(folder, row), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["mistral", "phi3"])
def test_a_window_that_llama_cpp_does_not_have_bounds_the_context(model_type, toy, tmp_path):
    export_gguf(toy(model_type, sliding_window=16), tmp_path / "m.gguf")
    name = GGUF_ARCHITECTURES[model_type].name
    assert GGUFReader(tmp_path / "m.gguf").fields[f"{name}.context_length"].contents() == 16


# ------------------------------------------------------------------------------------------------ the file's types


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_every_matrix_is_rounded_once_to_the_type_and_vectors_stay_fp32(dtype, toy, tmp_path):
    folder = toy("qwen3")
    export_gguf(folder, tmp_path / "exact.gguf", dtype="f32")
    export_gguf(folder, tmp_path / "m.gguf", dtype=dtype)
    kind = GGMLQuantizationType[dtype.upper()]
    exact = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(tmp_path / "exact.gguf").tensors}
    tensors = GGUFReader(tmp_path / "m.gguf").tensors
    assert {tensor.name for tensor in tensors} == set(exact)
    for tensor in tensors:
        vector = exact[tensor.name].ndim == 1
        assert tensor.tensor_type == (GGMLQuantizationType.F32 if vector else kind)
        assert np.array_equal(tensor.data, exact[tensor.name] if vector else quantize(exact[tensor.name], kind))


def test_q8_0_is_within_half_a_level_of_its_block(toy, tmp_path):
    export_gguf(toy("llama"), tmp_path / "exact.gguf", dtype="f32")
    export_gguf(toy("llama"), tmp_path / "m.gguf", dtype="q8_0")
    exact = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(tmp_path / "exact.gguf").tensors}
    seen = 0
    for tensor in GGUFReader(tmp_path / "m.gguf").tensors:
        if tensor.tensor_type == GGMLQuantizationType.Q8_0:
            blocks = exact[tensor.name].reshape(-1, 32)
            off = np.abs(dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32) - blocks)
            assert (off <= np.abs(blocks).max(1, keepdims=True) * (0.5 / 127 + 2**-10)).all()
            seen += 1
    assert seen == 16  # 2 blocks of 7 linears, embedding and head


def test_rows_that_are_no_whole_blocks_stay_f16_under_q8_0(toy, tmp_path):
    folder = toy("llama", hidden_size=48, intermediate_size=80)
    export_gguf(folder, tmp_path / "m.gguf", dtype="q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.ffn_down.weight"]) == ("F16", "F16")


def test_metadata_says_what_the_config_says(toy, tmp_path):
    export_gguf(toy("qwen3"), tmp_path / "m.gguf", dtype="q8_0")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "m.gguf").fields.items()}
    expected = {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "qwen3.block_count": 2,
        "qwen3.context_length": 256,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": 96,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.attention.value_length": 32,
        "qwen3.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: fields[name] for name in expected} == expected


# ------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_base_and_adapter_give_the_file_of_the_merged_folder(quantization, toy, tmp_path):
    base = adapted(toy("llama"), tmp_path / "a", quantization=quantization)
    merge_model(base.folder, tmp_path / "a", tmp_path / "merged", dtype="float32")
    export_gguf(base.folder, tmp_path / "direct.gguf", adapter=tmp_path / "a", dtype="f32")
    export_gguf(tmp_path / "merged", tmp_path / "merged.gguf", dtype="f32")
    assert_same_tensors(tmp_path / "direct.gguf", tmp_path / "merged.gguf")


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_4_bit_checkpoint_gives_the_file_of_its_merged_folder(model_type, toy, tmp_path):
    quantize_model(toy(model_type), tmp_path / "nf4")
    adapted(toy(model_type), tmp_path / "a", quantization="nf4", dtype="bfloat16")
    merge_model(tmp_path / "nf4", tmp_path / "a", tmp_path / "merged", dtype="float32")
    export_gguf(tmp_path / "nf4", tmp_path / "direct.gguf", adapter=tmp_path / "a", dtype="f32")
    export_gguf(tmp_path / "merged", tmp_path / "merged.gguf", dtype="f32")
    assert_same_tensors(tmp_path / "direct.gguf", tmp_path / "merged.gguf")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_llama_cpp_adds_the_adapters_file_to_the_base(model_type, toy, tmp_path, ids):
    row = ids[0, :15].tolist()
    base = adapted(toy(model_type), tmp_path / "a")
    export_gguf(base.folder, tmp_path / "m.gguf", dtype="f32")
    export_gguf_adapter(base.folder, tmp_path / "a", tmp_path / "a.gguf")
    with torch.no_grad():
        live = base.model(input_ids=torch.tensor([row])).logits[0].numpy()
    found = llama_cpp_log_probabilities(tmp_path / "m.gguf", row, tmp_path / "a.gguf")
    assert np.abs(found - log_softmax(live)).max() < tolerance(model_type)
    assert np.abs(log_softmax(live) - log_softmax(folder_logits(base.folder, row))).max() > 10 * tolerance(model_type)


def test_linears_of_other_scales_keep_theirs_in_the_adapters_file(toy, tmp_path, ids):
    folder, row = toy("llama"), ids[0, :15].tolist()
    adapted(folder, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {"q_proj": 24, "down_proj": 1.5}}))
    base = load_base(Model(path=str(folder), quantization="none", dtype="float32"))
    load_adapter(base, tmp_path / "a")
    export_gguf(folder, tmp_path / "m.gguf", dtype="f32")
    export_gguf_adapter(folder, tmp_path / "a", tmp_path / "a.gguf")
    with torch.no_grad():
        live = base.model.eval()(input_ids=torch.tensor([row])).logits[0].numpy()
    found = llama_cpp_log_probabilities(tmp_path / "m.gguf", row, tmp_path / "a.gguf")
    assert np.abs(found - log_softmax(live)).max() < tolerance("llama")


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar"),
        ("qwen3", {"attention_bias": True}, "has a bias"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama", {"rope_parameters": Hashable(rope_type="dynamic", rope_theta=1e4, factor=2.0)}, "'dynamic'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding window"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(model_type, changes, message, toy, tmp_path):
    with pytest.raises(ModelError, match=message):
        export_gguf(toy(model_type, **changes), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_value_outside_f16_is_named_and_nothing_is_left(toy, tmp_path):
    folder = edited(toy("llama"), tmp_path / "m", lambda tensors: tensors["lm_head.weight"].mul_(1e6))
    with pytest.raises(NonFiniteError, match=r"'output.weight'.*--dtype bf16"):
        export_gguf(folder, tmp_path / "out" / "m.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_file_is_kept(toy, tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(DiskError, match="already exists"):
        export_gguf(toy("llama"), tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_a_missing_package_is_named_with_the_line_that_installs_it(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RecipeError, match=r"pip install 'qlora_kit\[gguf\]'"):
        export_gguf(toy("llama"), tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["phi-3-mine", "Phi3"])
def test_a_folders_name_does_not_switch_on_llama_cpps_rules_for_phi_3(name, tmp_path):
    pytest.importorskip("xllamacpp")
    folder = add_tokenizer(write_model(tmp_path / name, "llama", vocab_size=VOCABULARY))
    export_gguf(folder, tmp_path / "m.gguf")
    assert LlamaCpp(tmp_path / "m.gguf").encode("a") != []


def test_a_tensor_is_held_in_pieces_only_while_it_is_written(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "PIECE_ELEMENTS", 200)
    export_gguf(toy("llama"), tmp_path / "pieces.gguf", dtype="q8_0")
    monkeypatch.undo()
    export_gguf(toy("llama"), tmp_path / "whole.gguf", dtype="q8_0")
    assert (tmp_path / "pieces.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
