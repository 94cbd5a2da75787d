"""A shape small enough for every tool."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": False}


@pytest.fixture
def tiny_shape(tmp_path: Path) -> str:
    """A folder with the config of a small Llama and nothing else."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    return str(folder)
