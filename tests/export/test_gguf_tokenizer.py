"""The tokenizer in a GGUF file gives training's token ids: in llama.cpp, and in transformers' own reading."""

from __future__ import annotations

import unicodedata

import pytest
from transformers import AutoTokenizer

from qlora_kit.data.tokenize import load_tokenizer
from qlora_kit.errors import ModelError
from qlora_kit.export.gguf import export_gguf
from qlora_kit.export.gguf_tokenizer import BYTE, CONTROL, PRE_TOKENIZERS, UNUSED, tokenizer_fields
from tests.conftest import write_model
from tests.export.toy import MARKS, TEMPLATE, TEXTS, add_tokenizer
from tools.llama_cpp import LlamaCpp

KINDS = {**dict.fromkeys(PRE_TOKENIZERS.values(), 400), "llama": 500, "gemma": 500}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_encodes_every_text_as_training_did(kind, tmp_path):
    pytest.importorskip("xllamacpp")
    folder = add_tokenizer(write_model(tmp_path / "m", "llama", vocab_size=1024), kind, KINDS[kind])
    export_gguf(folder, tmp_path / "m.gguf")
    ours, theirs = load_tokenizer(folder), LlamaCpp(tmp_path / "m.gguf")
    for text in TEXTS:
        assert theirs.encode(text) == ours(text, add_special_tokens=False)["input_ids"], text
        assert theirs.encode(text, special=True) == ours(text)["input_ids"], text


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_where_only_the_first_text_gets_a_space_chats_are_right_or_else_plain_texts(template, tmp_path):
    pytest.importorskip("xllamacpp")
    folder = add_tokenizer(write_model(tmp_path / "m", "mistral", vocab_size=1024), "mistral", 500, template)
    export_gguf(folder, tmp_path / "m.gguf")
    ours, theirs = load_tokenizer(folder), LlamaCpp(tmp_path / "m.gguf")
    first = "<|" if template else ("T", "1", "a")  # a text that begins with a space gets no second one here
    texts = [text for text in TEXTS if text.startswith(first)]
    assert texts
    for text in texts:
        assert theirs.encode(text) == ours(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("kind", ["gpt-2", "qwen2", "llama-bpe", "llama", "gemma"])
def test_transformers_reads_the_same_tokenizer_back(kind, tmp_path):
    model_type = {"gemma": "gemma2", "qwen2": "qwen2"}.get(kind, "phi3" if kind == "llama" else "llama")
    folder = add_tokenizer(write_model(tmp_path / "m", model_type, vocab_size=1024), kind, KINDS[kind])
    export_gguf(folder, tmp_path / "m.gguf")
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        composed = unicodedata.normalize("NFC", text)  # Qwen's tokenizer does that itself; GGUF cannot say so
        assert theirs.encode(composed, add_special_tokens=False) == ours.encode(composed, add_special_tokens=False)
    assert theirs.chat_template == TEMPLATE
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (2, 1, 0)


def test_every_row_of_the_embedding_has_a_token_and_a_kind(tmp_path):
    folder = add_tokenizer(write_model(tmp_path / "m", "llama", vocab_size=640), "llama", 300)
    tokenizer = load_tokenizer(folder)
    fields = tokenizer_fields(tokenizer, 640)
    tokens, kinds = fields["ggml.tokens"], fields["ggml.token_type"]
    assert len(tokens) == len(kinds) == len(fields["ggml.scores"]) == 640
    assert [kinds[tokens.index(mark)] for mark in MARKS] == [CONTROL] * 5
    assert [tokens[number] for number, kind in enumerate(kinds) if kind == BYTE][10] == "<0x0A>"
    assert kinds.count(UNUSED) == 640 - len(tokenizer)


def test_rules_that_llama_cpp_does_not_have_are_refused_by_name(tmp_path):
    folder = add_tokenizer(write_model(tmp_path / "m", "llama", vocab_size=640))
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"use_regex": true', '"use_regex": false', 1))
    with pytest.raises(ModelError, match="cuts text"):
        tokenizer_fields(load_tokenizer(folder), 640)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    folder = add_tokenizer(write_model(tmp_path / "m", "llama"))
    with pytest.raises(ModelError, match="the model 128 tokens"):
        tokenizer_fields(load_tokenizer(folder), 128)
