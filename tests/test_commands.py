"""The tokenizer that an adapter was trained with is the one that is used; another quantization is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora_kit.commands import held_out_rows, load_model, tokenizer_of, warn_of_other_quantization
from qlora_kit.data.tokenize import load_tokenizer
from qlora_kit.errors import ModelError
from qlora_kit.export.merge import merge_model
from tests.export.toy import add_tokenizer
from tests.peft_adapters import added_tokens, made_by_peft


@pytest.fixture
def folder(tiny_model, tmp_path: Path) -> Path:
    """A model with a tokenizer."""
    shutil.copytree(tiny_model("llama", vocab_size=320), tmp_path / "model")
    return add_tokenizer(tmp_path / "model")


def with_tokens(folder: Path, adapter: Path, *tokens: str) -> Path:
    """A folder beside whose adapter lies the model's tokenizer with more tokens."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(adapter)
    return adapter


def test_the_tokenizer_beside_an_adapter_is_taken_and_else_the_models(folder, tmp_path):
    added = with_tokens(folder, tmp_path / "a", "<|tool|>")
    (plain := tmp_path / "plain").mkdir()
    size = len(load_tokenizer(folder))
    assert len(tokenizer_of(folder, [])) == len(tokenizer_of(folder, [plain, plain])) == size
    assert tokenizer_of(folder, [str(added)])("<|tool|>")["input_ids"] == [size]


def test_adapters_with_one_tokenizer_work_together_and_others_are_refused(folder, tmp_path):
    adapters = [with_tokens(folder, tmp_path / name, "<|tool|>") for name in "ab"]
    assert len(tokenizer_of(folder, adapters)) == len(load_tokenizer(folder)) + 1
    (plain := tmp_path / "plain").mkdir()
    with pytest.raises(ModelError, match=r"a and .*plain: their tokenizers differ \(vocabulary\).*one at a time"):
        tokenizer_of(folder, [*adapters, plain])
    (with_tokens(folder, tmp_path / "c") / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ModelError, match=r"plain and .*c: their tokenizers differ \(chat template\)"):
        tokenizer_of(folder, [plain, tmp_path / "c"])


@pytest.mark.filterwarnings("ignore")  # PEFT warns of resized tables
def test_a_merged_model_gets_the_tokenizer_that_its_proof_read_the_documents_with(tiny_model, tmp_path):
    folder = add_tokenizer(Path(shutil.copytree(tiny_model("llama"), tmp_path / "m")), size=128)
    added_tokens(folder, "llama", tmp_path / "a")
    with_tokens(folder, tmp_path / "a", "<|tool|>", "<|end|>")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    merge_model(folder, tmp_path / "a", tmp_path / "out")
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "a<|tool|>b"}) + "\n")
    ((ids, _),) = held_out_rows(folder, tmp_path / "d.jsonl", tmp_path / "a")
    assert load_tokenizer(tmp_path / "out").convert_ids_to_tokens(ids)[:3] == ["a", "<|tool|>", "b"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_adapters_that_record_another_quantization_than_the_bases_are_named(folder, tmp_path, capfd):
    def adapter(name: str, **record: object) -> str:
        made_by_peft(folder, "llama", tmp_path / name, target_modules=["q_proj"])
        if record:
            (tmp_path / name / "qlora_kit.json").write_text(json.dumps(record))
        return str(tmp_path / name)

    adapters = [adapter("a", quantization="nf4"), adapter("b", quantization="nf4", double_quant=False), adapter("p")]
    base = load_model(str(folder), adapters, "auto", any_base=True)
    capfd.readouterr()
    warn_of_other_quantization(base, adapters)
    (said,) = " ".join(capfd.readouterr().err.split()).split("warning: ")[1:]
    assert said.startswith(f"{tmp_path / 'b'}: trained beside a base in nf4, this one is in nf4 with double quantizat")
    warn_of_other_quantization(load_model(str(folder), adapters[:1], "none", any_base=True), adapters[:1])
    assert "this one is in 16 or 32 bits" in " ".join(capfd.readouterr().err.split())
