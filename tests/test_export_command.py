"""`export gguf` and `chat` as they are typed."""

from __future__ import annotations

import json

import pytest
from gguf import GGUFReader
from typer.testing import CliRunner

from qlora_kit.cli import app
from qlora_kit.errors import RecipeError
from qlora_kit.export.merge import merge_model
from tests.export.test_merge import adapted
from tests.export.toy import add_tokenizer


@pytest.fixture(scope="module")
def folder(tiny_model):
    return add_tokenizer(tiny_model("llama", vocab_size=320))


def typed(*words: object, stdin: str = ""):
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


def test_base_and_adapter_become_a_file_with_a_modelfile_beside_it(folder, tmp_path):
    adapted(folder, tmp_path / "a")
    words = ["export", "gguf", "--model", folder, "--adapter", tmp_path / "a", "--out", tmp_path / "m.gguf", "--json"]
    report = json.loads(typed(*words, "--dtype", "q8_0").stdout)
    assert (report["dtype"], report["architecture"], report["merged_tensors"]) == ("q8_0", "llama", 14)
    assert len(GGUFReader(tmp_path / "m.gguf").tensors) == report["tensors"] == 21
    assert report["bytes_written"] == (tmp_path / "m.gguf").stat().st_size
    assert report["modelfile"] == str(tmp_path / "m.Modelfile")
    assert (tmp_path / "m.Modelfile").read_text().startswith("FROM ./m.gguf\nTEMPLATE ")


def test_a_merged_folder_and_an_adapter_alone_are_written_too(folder, tmp_path):
    adapted(folder, tmp_path / "a")
    merge_model(folder, tmp_path / "a", tmp_path / "merged")
    words = ["export", "gguf", "--model", tmp_path / "merged", "--out", tmp_path / "m.gguf"]
    assert "21 tensors of llama in f16" in typed(*words).stdout
    words = ["export", "gguf", "--model", folder, "--adapter", tmp_path / "a", "--lora", "--out", tmp_path / "a.gguf"]
    assert "28 tensors of llama in f32" in typed(*words).stdout
    assert GGUFReader(tmp_path / "a.gguf").fields["adapter.type"].contents() == "lora"
    assert not (tmp_path / "a.Modelfile").exists()


def test_lora_without_an_adapter_is_refused(folder, tmp_path):
    found = typed("export", "gguf", "--model", folder, "--lora", "--out", tmp_path / "a.gguf")
    assert isinstance(found.exception, RecipeError) and "--adapter" in str(found.exception)


def test_without_a_template_there_is_no_modelfile_and_that_is_said(tiny_model, tmp_path):
    bare = add_tokenizer(tiny_model("llama", vocab_size=321), template=None)
    assert typed("export", "gguf", "--model", bare, "--out", tmp_path / "m.gguf").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_chat_answers_each_line_of_a_pipe(folder):
    found = typed("chat", "--model", folder, "--max-new-tokens", 3, stdin="Hello\n/reset\nHello\n/exit\n")
    half = len(found.stdout) // 2
    assert found.exit_code == 0 and half > 1
    assert found.stdout[:half] == found.stdout[half:]  # what was said before the reset is forgotten


def test_generate_shows_what_chat_says_first(folder):
    options = ["--model", folder, "--max-new-tokens", 3]
    assert typed("generate", *options, "--prompt", "Hello").stdout == typed("chat", *options, stdin="Hello\n").stdout
