"""Small random models of every architecture, written as real Hugging Face folders. Used by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Each worker and its children take one core: threads that wait for a core which another has cost four times the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 256}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, dict] = {
    "llama": GATED,
    "mistral": {**GATED, "sliding_window": 16, "head_dim": 16},
    "qwen2": {**GATED, "tie_word_embeddings": True},
    "qwen3": {**GATED, "head_dim": 32},
    "gemma2": {**GATED, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {**GATED, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "phi3": {**GATED, "num_key_value_heads": 4},
    "gpt2": {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {**SMALL, "intermediate_size": 96, "max_position_embeddings": 256},
    "olmo2": GATED,
}


def write_model(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A model of `model_type` with random weights (norms, biases too), saved by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **SPECIAL, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs leave for later plans goes nowhere near the user's cache; children inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("QLORA_KIT_NO_CALIBRATION", "1")  # no test's plan depends on the runs before it
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("llama")` -> folder; each made once."""
    made: dict[tuple, Path] = {}

    def make(model_type: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        key = (model_type, dtype, *sorted(changes.items()))
        if key not in made:
            made[key] = write_model(tmp_path_factory.mktemp(model_type), model_type, dtype, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Token ids, [2, 24]."""
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
