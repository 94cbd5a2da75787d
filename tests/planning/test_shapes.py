"""Configs found, tensors counted, targets selected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.errors import ModelError, RecipeError
from qlora_kit.planning.shapes import (
    ModelShapes,
    catalogue,
    matches,
    model_shapes,
    parse_config,
    read_config,
    select_targets,
)

# parameters of the published checkpoints; a tied head counts once, buffers do not
PUBLISHED_PARAMETERS = {
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "llama-7b": 6_738_415_616,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "codellama-34b": 33_743_970_304,
    "tinyllama-1.1b": 1_100_048_384,
    "yi-34b": 34_388_917_248,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-22b": 22_247_282_688,
    "mistral-small-24b": 23_572_403_200,
    "mistral-large-123b": 122_610_069_504,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
    "phi-4": 14_659_507_200,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "gpt-neox-20b": 20_554_567_680,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
}


def shapes_of(name: str) -> ModelShapes:
    return model_shapes(*read_config(name), planned_only=True)


@pytest.mark.parametrize("name", catalogue())
def test_a_catalogue_model_has_the_published_number_of_parameters(name: str) -> None:
    assert shapes_of(name).total_parameters == PUBLISHED_PARAMETERS[name]


def test_every_catalogue_name_is_lower_case_and_every_hub_id_leads_to_its_entry() -> None:
    for name, entry in catalogue().items():
        assert name == name.lower()
        for hub_id in entry["hub"]:
            assert read_config(hub_id)[0] == entry["config"]


def test_parameters_are_the_sum_over_all_tensors() -> None:
    shapes = shapes_of("gpt2")
    sizes = [1 if not shape else shape[0] * (shape[1] if len(shape) > 1 else 1) for _, shape in shapes.tensors]
    linears = sum(shape[0] * shape[1] for _, shape in shapes.linear_weights)
    assert shapes.total_parameters == sum(sizes) + linears


# ------------------------------------------------------------------------------------------ finding a config


def test_a_folder_and_its_config_are_read_from_the_disk(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_config(str(tmp_path)) == ({"model_type": "llama"}, str(tmp_path / "config.json"))
    assert read_config(str(tmp_path / "config.json"))[0] == {"model_type": "llama"}


def test_a_local_folder_goes_before_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2/config.json").write_text('{"model_type": "mine"}')
    monkeypatch.chdir(tmp_path)
    assert read_config("gpt2")[0] == {"model_type": "mine"}


def test_a_folder_without_config_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json: no such file"):
        read_config(str(tmp_path))


def test_catalogue_names_ignore_case_and_an_unknown_one_gets_the_nearest() -> None:
    assert read_config("Llama-2-7B")[0] == catalogue()["llama-2-7b"]["config"]
    with pytest.raises(ModelError, match="did you mean 'llama-2-7b'"):
        read_config("lama-2-7b")


def test_an_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(ModelError, match="nobody/nothing: no such local folder.*Name or service not known; give a"):
        read_config("nobody/nothing")


def test_a_hub_model_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json"))
    assert read_config("somebody/model") == ({"model_type": "llama"}, "somebody/model")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not valid JSON"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": Infinity}', "Infinity is not JSON"),
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ("[1]", "expected a JSON object, found list"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "not valid JSON"),
        ("\udcff", "not valid JSON"),
    ],
)
def test_a_damaged_config_is_an_error_that_names_the_file(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=rf"config.json: (not valid JSON: )?{complaint}"):
        parse_config(path)


def test_an_error_in_a_config_names_source_and_field() -> None:
    with pytest.raises(ModelError, match=r"^here: config field 'vocab_size': .* found 'many'"):
        model_shapes({**catalogue()["llama-7b"]["config"], "vocab_size": "many"}, "here")


# ------------------------------------------------------------------------------------------------ targets

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        ("all-linear", True),
        (["q_proj"], True),
        (["self_attn.q_proj"], True),
        ([Q0], True),
        (["proj"], False),
        (["v_proj", "k_proj"], False),
        (r".*\.(q|v)_proj", True),
        (r"(q|v)_proj", False),
        (r"model\.layers\.1\..*", False),
    ],
)
def test_targets_select_as_peft_does(target_modules: str | list[str], expected: bool) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    assert matches(Q0, target_modules) is expected
    if target_modules != "all-linear":  # peft writes the names out first
        theirs = check_target_module_exists(LoraConfig(target_modules=target_modules), Q0)
        assert bool(theirs) is expected


def test_all_linear_selects_every_linear_of_every_block() -> None:
    shapes = shapes_of("phi-3-mini")
    assert select_targets(shapes, "all-linear") == [list(shapes.linears)] * 32


def test_a_regular_expression_may_select_differently_per_block() -> None:
    selection = select_targets(shapes_of("llama-7b"), r".*\.layers\.(3|4)\.mlp\.up_proj")
    assert [len(block) for block in selection] == [0, 0, 0, 1, 1] + [0] * 27


@pytest.mark.parametrize(
    ("target_modules", "complaint"),
    [
        (["q_porj"], r"'q_porj' selects nothing; did you mean 'q_proj'.*self_attn.k_proj"),
        (["q_proj", "lm_had"], r"'lm_had' selects nothing; did you mean 'lm_head'"),
        (["lm_head"], r"selects no linear of the decoder blocks; add one of self_attn.q_proj"),
        ("q_proj", r"'q_proj' selects nothing; as a list it would: \[q_proj\]"),
        ("all-linaer", r"did you mean 'all-linear'"),
        (r".*\.qq_proj", r"must match whole names such as 'model.layers.0.self_attn.q_proj'"),
        ([], r"the list is empty"),
    ],
)
def test_a_target_that_selects_nothing_is_an_error_with_the_way_out(
    target_modules: str | list[str], complaint: str
) -> None:
    with pytest.raises(RecipeError, match=complaint):
        select_targets(shapes_of("llama-7b"), target_modules)


@pytest.mark.parametrize("pattern", ["(a+)+b", ".*" * 7, "a" * 600, "(", "(?P<x>a)(?P<x>b)", "a{99999999999}"])
def test_a_hostile_or_broken_expression_is_refused_before_it_is_matched(pattern: str) -> None:
    with pytest.raises(RecipeError, match="adapter.target_modules"):
        matches(Q0, pattern)


def test_the_catalogue_is_plain_json_that_needs_no_code() -> None:
    text = Path(read_config.__code__.co_filename).with_name("models.json").read_text()
    assert json.loads(text) == catalogue()
