"""A GGUF file that is not the merged folder is caught."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.export.gguf import export_gguf
from qlora_kit.export.merge import merge_model
from tests.conftest import write_model
from tests.export.test_merge import adapted
from tests.export.toy import add_tokenizer
from tools.quickstart.packages import SetupError
from tools.quickstart.read_back import read_back


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with `merged`, and `m.gguf` from the same base and adapter; `other.gguf` is the base alone."""
    place = tmp_path_factory.mktemp("q")
    base = write_model(place / "base", "llama", torch.bfloat16, vocab_size=320, tie_word_embeddings=True, head_dim=16)
    adapted(add_tokenizer(base), place / "a", dtype="bfloat16")
    merge_model(base, place / "a", place / "merged")
    export_gguf(base, place / "m.gguf", adapter=place / "a")
    export_gguf(base, place / "other.gguf")
    return place


def test_the_file_of_base_and_adapter_is_the_merged_folder(made):
    assert read_back(made / "m.gguf", made / "merged") == "20 of 20 tensors bit-equal to the merged model"


def test_another_models_file_is_named(made):
    with pytest.raises(SetupError, match=r"other.gguf: 6 of 20 tensors"):
        read_back(made / "other.gguf", made / "merged")
