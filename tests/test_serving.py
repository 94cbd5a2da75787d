"""What servers cannot load is said by name when a recipe is read; the facts stand in SERVERS with their source."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from qlora_kit.adapters.store import save_adapter
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.cli import app
from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.recipe import Recipe
from qlora_kit.serving import SERVERS, TABLES, features, obstacles, serving_notes
from tests.peft_adapters import made_by_peft

PLAIN = {"base_model.model.model.layers.0.q_proj.lora_A.weight"}
HEAD = "base_model.model.lm_head"


def test_plain_lora_of_a_small_rank_is_served_by_all():
    assert features({"use_dora": False, "alpha_pattern": {}}, PLAIN) == set()
    for model_type in ARCHITECTURES.keys() - {"gpt2"}:
        assert obstacles(model_type, 16) == []


@pytest.mark.parametrize(
    ("config", "name", "feature", "servers"),
    [
        ({"use_dora": True}, "", "DoRA", 2),
        ({"use_rslora": True}, "", "rsLoRA", 1),
        ({"alpha_pattern": {"q_proj": 3}}, "", "alphas that differ", 1),
        ({}, f"{HEAD}.weight", "trained modules", 2),
        ({}, "base_model.model.model.layers.0.q_proj.base_layer.bias", "biases", 2),
        ({}, "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "token rows", 2),
    ],
)
def test_each_feature_is_found_and_named(config, name, feature, servers):
    found = features(config, PLAIN | {name})
    assert found == {feature}
    lines = obstacles("llama", 16, found)
    assert len(lines) == servers
    assert all(f"({feature}: " in line and line.endswith("merge it") for line in lines)


def test_copies_of_the_base_beside_lora_on_a_head_are_no_trained_modules():
    assert features({}, {f"{HEAD}.base_layer.weight", f"{HEAD}.lora_A.weight", f"{HEAD}.lora_B.weight"}) == {TABLES}


@pytest.mark.parametrize(("rank", "limit"), [(17, 32), (64, 64), (300, 320), (512, 512)])
def test_larger_ranks_name_the_option(rank, limit):
    assert obstacles("llama", rank) == [
        f"vLLM serves an adapter of rank {rank} when started with --max-lora-rank {limit}"
    ]


def test_ranks_above_all_limits_and_gpt2_are_said():
    assert "rank 513: at most 512" in obstacles("llama", 513)[0]
    assert [line.partition(" ")[0] for line in obstacles("gpt2", 8)] == list(SERVERS)


def test_plan_says_it_when_the_recipe_is_read(tiny_model, tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {{path: {tiny_model('llama')}}}\ndata: {{train: t}}\nadapter: {{rank: 40}}\n")
    said = CliRunner().invoke(app, ["plan", str(recipe), "--json"])
    assert said.exit_code == 0
    assert "--max-lora-rank 64" in said.stderr
    assert "--max-lora-rank" not in said.stdout


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({"use_rslora": True}, 0),  # what is written has one alpha
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}}, 1),
        ({"alpha_pattern": {"q_proj": 3}}, 1),
    ],
)
def test_a_recipe_that_starts_from_an_adapter_is_told_of_what_it_will_write(settings, lines, tiny_model, tmp_path):
    made_by_peft(tiny_model("llama"), "llama", tmp_path, target_modules=["q_proj", "v_proj"], **settings)
    values = {"model": {"path": "m"}, "adapter": {"start_from": str(tmp_path)}, "data": {"train": "t"}}
    shapes = model_shapes(*read_config(str(tiny_model("llama"))))
    assert len(serving_notes(Recipe.model_validate(values), shapes)) == lines


@pytest.mark.parametrize(
    ("model_type", "settings", "said"),
    [
        ("llama", {"modules_to_save": ["lm_head"]}, ["vLLM: modules_to_save is refused", "llama.cpp: its converter"]),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, []),
        ("mistral", {"target_modules": ["q_proj", "lm_head"]}, ["vLLM: only where its class has them, llama"]),
        ("qwen2", {"target_modules": ["q_proj", "lm_head"]}, ["vLLM: only where", "llama.cpp: it is refused, since a"]),
    ],
)
def test_what_is_trained_beside_the_linears_is_told_of_when_the_recipe_is_read(model_type, settings, said, tiny_model):
    values = {"model": {"path": "m"}, "adapter": settings, "data": {"train": "t"}}
    shapes = model_shapes(*read_config(str(tiny_model(model_type))))
    lines = serving_notes(Recipe.model_validate(values), shapes)
    assert len(lines) == len(said)
    for line, words in zip(lines, said):
        server, _, reason = words.partition(": ")
        assert line.startswith(server) and f": {reason}" in line


def test_the_page_on_adapters_names_the_sources():
    page = (Path(__file__).parents[1] / "docs/adapters.md").read_text()
    assert all(server.source.partition(":")[0] in page for server in SERVERS.values())
    assert f"up to {SERVERS['vLLM'].ranks[-1]}; above {SERVERS['vLLM'].default_rank}" in page


def test_what_this_kit_writes_has_no_feature_that_a_server_refuses(tiny_model, tmp_path):
    from qlora_kit.adapter_files import read_config, tensor_shapes
    from qlora_kit.adapters.inject import inject
    from qlora_kit.base.loader import load_base
    from qlora_kit.recipe import Adapter, Model

    base = load_base(Model(path=str(tiny_model("llama"))))
    inject(base, Adapter(rank=4), seed=0)
    save_adapter(base, tmp_path)
    assert features(read_config(tmp_path), tensor_shapes(tmp_path)) == set()
