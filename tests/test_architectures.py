"""ARCHITECTURES against the models that transformers builds: every row is tested by being there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from qlora_kit.architecture_parts import dimension, flag
from qlora_kit.architectures import ARCHITECTURES, PLANNED_ONLY, architecture_of, final_softcap, tied
from qlora_kit.errors import ModelError
from qlora_kit.planning.shapes import model_shapes

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
REQUIRED: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
GPT2 = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4}
AWAY_FROM_DEFAULTS = {**REQUIRED, "head_dim": 24, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT2, "n_inner": 100, "n_positions": 77},
    "gpt_neox": {**REQUIRED, "attention_bias": False},
}


def tensors_of_transformers(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict, without a tied head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings, **SPECIAL))
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state[f"{ARCHITECTURES[config['model_type']].head}.weight"]
    return state


def tensors_of_row(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes = model_shapes(config, "test")
    return dict([*shapes.tensors, *shapes.linear_weights])


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_row_lists_exactly_the_tensors_of_transformers_with_all_options_set(model_type: str, tie: bool) -> None:
    config = {"model_type": model_type, "tie_word_embeddings": tie, **OPTIONS.get(model_type, AWAY_FROM_DEFAULTS)}
    assert tensors_of_row(config) == tensors_of_transformers(config)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_row_fills_absent_keys_as_transformers_does(model_type: str) -> None:
    config = {"model_type": model_type, **(GPT2 if model_type == "gpt2" else REQUIRED)}
    assert tensors_of_row(config) == tensors_of_transformers(config)


@pytest.mark.parametrize("model_type", PLANNED_ONLY)
def test_what_is_only_planned_has_as_many_parameters_as_in_transformers(model_type: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**(GPT2 if model_type == "gpt_bigcode" else REQUIRED), "n_positions": 77, "tie_word_embeddings": False}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config, **SPECIAL))
    shapes = model_shapes({"model_type": model_type, **config}, "test", planned_only=True)
    assert shapes.total_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_what_is_only_planned_cannot_be_trained() -> None:
    for model_type in PLANNED_ONLY:
        with pytest.raises(ModelError, match=f"model_type '{model_type}' cannot be trained by this kit") as raised:
            architecture_of({"model_type": model_type}, "config.json")
        assert raised.value.exit_code == 4


@pytest.mark.parametrize("model_type", sorted(set(ARCHITECTURES) - {"gpt2", "gpt_neox"}))
def test_null_means_as_many_key_heads_as_query_heads(model_type: str) -> None:
    shapes = model_shapes({"model_type": model_type, **REQUIRED, "head_dim": 16, "num_key_value_heads": None}, "test")
    fused = [linear for linear in shapes.linears if linear.name == "self_attn.qkv_proj"]
    keys = [linear.out_features for linear in shapes.linears if linear.name == "self_attn.k_proj"]
    assert keys == [64] or fused[0].out_features == 3 * 64


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_linears_that_a_row_names_by_role_exist_and_are_all(model_type: str) -> None:
    row = ARCHITECTURES[model_type]
    config = {"model_type": model_type, **(GPT2 if model_type == "gpt2" else REQUIRED)}
    names = [linear.name for linear in row.linears(config)]
    assert sorted([*row.attention_linears, *row.mlp_in, row.mlp_out]) == sorted(names)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_no_tensor_of_a_model_is_taken_for_a_computed_buffer_or_renamed(model_type: str) -> None:
    config = {"model_type": model_type, **OPTIONS.get(model_type, AWAY_FROM_DEFAULTS)}
    names = list(tensors_of_row(config))
    assert [ARCHITECTURES[model_type].name_in_model(name) for name in names] == names


def test_names_of_older_checkpoints_become_those_of_the_model() -> None:
    gpt2, pythia = ARCHITECTURES["gpt2"], ARCHITECTURES["gpt_neox"]
    assert gpt2.name_in_model("h.0.attn.c_attn.bias") == "transformer.h.0.attn.c_attn.bias"
    assert pythia.name_in_model("embed_out.weight") == "lm_head.weight"
    assert gpt2.name_in_model("h.0.attn.bias") is None
    assert pythia.name_in_model("gpt_neox.layers.3.attention.rotary_emb.inv_freq") is None


def test_a_transposed_weight_is_stored_in_by_out() -> None:
    wide = ARCHITECTURES["gpt2"].linears(GPT2)[0]
    assert (wide.name, wide.out_features, wide.in_features) == ("attn.c_attn", 192, 64)
    assert ARCHITECTURES["gpt2"].weight_shape(wide) == (64, 192)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "gemma3_text"])
def test_gpt2_and_gemma_tie_unless_told_otherwise(model_type: str) -> None:
    assert tied({"model_type": model_type})
    assert not tied({"model_type": model_type, "tie_word_embeddings": False})


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "gpt_neox"])
def test_the_others_do_not_tie_unless_told_to(model_type: str) -> None:
    assert not tied({"model_type": model_type, "tie_word_embeddings": None})
    assert tied({"model_type": model_type, "tie_word_embeddings": True})


def test_gemma2_caps_its_logits_at_30_by_default_and_llama_never() -> None:
    assert final_softcap({"model_type": "gemma2"}) == 30.0
    assert final_softcap({"model_type": "gemma2", "final_logit_softcapping": None}) is None
    assert final_softcap({"model_type": "llama"}) is None
    with pytest.raises(ModelError, match="final_logit_softcapping.*positive.*-1"):
        final_softcap({"model_type": "gemma2", "final_logit_softcapping": -1})


def test_an_unknown_architecture_is_named_with_the_nearest_and_all_supported() -> None:
    with pytest.raises(ModelError, match=r"m/config.json: model_type 'lama' .*did you mean 'llama'.*gpt2"):
        architecture_of({"model_type": "lama"}, "m/config.json")
    with pytest.raises(ModelError, match="no 'model_type'"):
        architecture_of({}, "m/config.json")


def test_a_multimodal_wrapper_says_what_to_do() -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    with pytest.raises(ModelError, match="'gemma3' is a multimodal wrapper around 'gemma3_text', which is supported"):
        architecture_of(config, "m")
    with pytest.raises(ModelError, match="not supported either"):
        architecture_of({"model_type": "mllama", "text_config": {"model_type": "mllama_text"}}, "m")


@pytest.mark.parametrize("value", [0, -1, 2**40, 1.5, "64", True, [64], float("inf")])
def test_an_absurd_dimension_is_refused_by_name(value: object) -> None:
    with pytest.raises(ModelError, match=f"'hidden_size'.*found {re.escape(repr(value))}"):
        dimension({"hidden_size": value}, "hidden_size")


def test_a_missing_dimension_is_named() -> None:
    with pytest.raises(ModelError, match="'hidden_size' or 'n_embd'"):
        dimension({}, "hidden_size", "n_embd")
    with pytest.raises(ModelError, match="'num_hidden_layers'.*found 99999"):
        model_shapes({"model_type": "llama", **REQUIRED, "num_hidden_layers": 99999}, "m")


def test_a_flag_must_be_a_boolean() -> None:
    assert flag({"attention_bias": None}, "attention_bias", True)
    with pytest.raises(ModelError, match="'attention_bias': expected true or false, found 'yes'"):
        flag({"attention_bias": "yes"}, "attention_bias", False)


def test_a_decoder_with_cross_attention_is_refused() -> None:
    with pytest.raises(ModelError, match="m: config field 'add_cross_attention'"):
        model_shapes({"model_type": "gpt2", **GPT2, "add_cross_attention": True}, "m")
