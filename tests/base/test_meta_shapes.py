"""Shapes by building transformers' class: the table's where there is a row, all parameters where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.meta_shapes import meta_shapes
from qlora_kit.errors import ModelError
from qlora_kit.plan_command import answer
from qlora_kit.planning.hardware import GIB, Device
from qlora_kit.planning.planner import plan_shapes
from qlora_kit.planning.shapes import model_shapes
from qlora_kit.recipe import recipe_for_model

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 96, **SPECIAL}
GPT2 = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 77, **SPECIAL}
OTHERS: dict[str, dict[str, Any]] = {
    "starcoder2": SMALL,
    "stablelm": SMALL,
    "cohere": SMALL,
    "falcon": SMALL,
    "opt": SMALL | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gptj": GPT2 | {"rotary_dim": 8},
    "granite": SMALL,
    "bloom": SMALL,
    "glm4": SMALL,
    "mixtral": SMALL | {"num_local_experts": 4},
    "qwen2_moe": SMALL | {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "gpt_oss": SMALL | {"num_local_experts": 4},
}
UNSEEN = {"gemma3_text": {"activations"}}  # that heads are normed first, no tensor tells


def config_of(model_type: str) -> dict[str, Any]:
    wide = {"head_dim": 24, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
    return {"model_type": model_type, **(GPT2 if model_type == "gpt2" else SMALL | wide)}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_with_a_row_both_ways_give_the_same_tensors_and_bytes_of_every_component(model_type: str, tie: bool) -> None:
    config = config_of(model_type) | {"tie_word_embeddings": tie}
    (built, notes), row = meta_shapes(config, "test"), model_shapes(config, "test")
    assert sorted([*built.tensors, *built.linear_weights]) == sorted([*row.tensors, *row.linear_weights])
    assert (built.tied, built.softcap, built.vocabulary) == (row.tied, row.softcap, row.vocabulary)
    recipe, device = recipe_for_model("gpt2", ["data.seq_len=256"]), Device("cuda", "a card", GIB)
    one, other = (plan_shapes(shapes, recipe, device).components for shapes in (built, row))
    assert {name for name in one if one[name] != other[name]} == UNSEEN.get(model_type, set())
    assert notes == []


@pytest.mark.parametrize("model_type", OTHERS)
def test_without_a_row_all_parameters_of_transformers_class_are_counted(model_type: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **OTHERS[model_type]))
    shapes, notes = meta_shapes({"model_type": model_type, **OTHERS[model_type]}, "test")
    assert shapes.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shapes.experts[0] > 1) == (model_type in ("mixtral", "qwen2_moe", "gpt_oss"))
    assert notes == []
    out = shapes.linear(shapes.architecture.mlp_out)
    assert out.out_features == shapes.hidden and shapes.linear(shapes.architecture.attention_out).name != out.name


def test_blocks_that_differ_count_as_the_largest_and_it_is_said() -> None:
    config = {"model_type": "qwen2_moe", **OTHERS["qwen2_moe"], "mlp_only_layers": [0]}
    assert "its blocks differ, each is counted as the largest" in meta_shapes(config, "test")[1]


def test_what_has_no_attention_or_is_unknown_is_refused() -> None:
    with pytest.raises(ModelError, match="m: model_type 'mamba' is not supported, and its blocks are no attention"):
        meta_shapes({"model_type": "mamba", **SMALL}, "m")
    with pytest.raises(ModelError, match="m: model_type 'lama' is not supported; did you mean 'llama'"):
        meta_shapes({"model_type": "lama"}, "m")
    with pytest.raises(ModelError, match="'num_hidden_layers'.*found 99999"):
        meta_shapes({"model_type": "falcon", "num_hidden_layers": 99999}, "m")


@pytest.mark.parametrize("stack", ["kit", "peft"])
def test_plan_says_that_it_was_built_and_is_not_trained(
    stack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "starcoder2", **SMALL}))
    found = answer(str(tmp_path), [], gpu="rtx-4090", stack=stack)
    said = capsys.readouterr().err
    assert "'starcoder2' is not one that this kit trains" in said and "built without memory in" in said
    assert found.next_step == "none here: this kit does not train model_type 'starcoder2'"
