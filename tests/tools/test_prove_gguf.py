"""The proof passes for the folder's own file and fails for another model's."""

from __future__ import annotations

import json

import pytest

from qlora_kit.export.gguf import export_gguf
from tests.conftest import write_model
from tests.export.toy import add_tokenizer
from tools.prove_gguf import compare

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models with one tokenizer, and chats."""
    place = tmp_path_factory.mktemp("p")
    for name, changes in (("one", {}), ("other", {"num_hidden_layers": 3})):
        folder = add_tokenizer(write_model(place / name, "llama", vocab_size=320, **changes))
        export_gguf(folder, place / f"{name}.gguf", dtype="f16")
    asked = ("Why is the sky blue?", "Name a prime.", "Привет?")
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "It is so."}]}
        for text in asked
    ]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_the_folders_own_file_passes(place):
    found = compare(place / "one", place / "one.gguf", place / "chats.jsonl", records=3)
    assert found.passed
    assert (found.same_ids, found.same_prompts) == ((3, 3), (3, 3))
    assert found.learned_tokens > 20 and found.same_first_choice > 0.9
    assert found.loss == pytest.approx(found.llama_cpp_loss, abs=1e-3) and 0 <= found.mean_kl < 1e-5


def test_another_models_file_fails(place):
    found = compare(place / "one", place / "other.gguf", place / "chats.jsonl", records=1)
    assert not found.passed and found.mean_kl > 1e-3
