"""Adapters of every kind that PEFT makes, on the small models of conftest. Used by tests of adapters and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.architectures import ARCHITECTURES

NORMS = {"gpt2": ["ln_1", "ln_f"], "gpt_neox": ["input_layernorm", "final_layer_norm"]}


def embedding_of(model_type: str) -> str:
    return ARCHITECTURES[model_type].embedding.rpartition(".")[2]


def kinds(model_type: str) -> dict[str, dict[str, Any]]:
    """What PEFT can make, by a name of ours."""
    row, embedding = ARCHITECTURES[model_type], embedding_of(model_type)
    linears = [name.rpartition(".")[2] for name in row.attention_linears]
    norms = NORMS.get(model_type, ["post_attention_layernorm", "norm"])
    return {
        "dora": {"target_modules": "all-linear", "use_dora": True},
        "rslora patterns": {
            "target_modules": linears,
            "use_rslora": True,
            "rank_pattern": {linears[0]: 2},
            "alpha_pattern": {f"0.*{linears[-1]}": 3},
        },
        "some layers": {"target_modules": linears, "layers_to_transform": [1], "exclude_modules": linears[:1]},
        "head and norms saved": {"target_modules": linears, "modules_to_save": ["lm_head", *norms]},
        "embedding saved": {"target_modules": linears, "modules_to_save": [embedding]},
        "both saved, tied": {
            "target_modules": linears,
            "modules_to_save": [embedding, "lm_head"],
            "ensure_weight_tying": True,
        },
        "LoRA on embedding": {"target_modules": [*linears, embedding]},
        "LoRA on both": {"target_modules": [*linears, embedding, "lm_head"]},
        "DoRA on head": {"target_modules": [*linears, "lm_head"], "use_dora": True},
        "token rows": {"target_modules": linears, "trainable_token_indices": [5, 9]},
        "biases": {"target_modules": linears, "bias": "all"},
    }


KINDS = tuple(kinds("llama"))


def made_by_peft(folder: Path, model_type: str, adapter: Path, seed: int = 3, **settings: Any) -> Any:
    """PEFT's model with an adapter in which every trained value is away from its start; saved too."""
    torch.manual_seed(seed)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings
    config = peft.LoraConfig(**settings, fan_in_fan_out=ARCHITECTURES[model_type].transposed)
    theirs = peft.get_peft_model(plain, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(adapter)
    return theirs.eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def added_tokens(folder: Path, model_type: str, adapter: Path) -> Any:
    """PEFT's model whose base got four more tokens before its adapter; saved."""
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain.resize_token_embeddings(132)
    transposed = ARCHITECTURES[model_type].transposed
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", fan_in_fan_out=transposed
    )
    theirs = peft.get_peft_model(plain, config).eval()
    theirs.save_pretrained(adapter)
    return theirs
