"""A plan's second opinion: what fits runs, what does not says what held the memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_kit.planning.comparison import OTHER
from qlora_kit.planning.hardware import CUDA_RUNTIME_BYTES, Device
from qlora_kit.planning.planner import Plan, plan_shapes
from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.profiling.simulate import Simulated, simulate
from qlora_kit.recipe import Recipe, recipe_for_model

CONFIG = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3}
CONFIG |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": False}
MIB = 1 << 20


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    overrides = ["data.seq_len=512", "data.eval=held-out.jsonl", "memory.placement=device", "train.grad_accumulation=2"]
    return recipe_for_model(str(tmp_path / "config.json"), [*overrides, "memory.loss_chunk_tokens=64"])


def planned_for(recipe: Recipe, memory_bytes: int) -> Plan:
    device = Device("cuda", "a card", memory_bytes + CUDA_RUNTIME_BYTES)
    return plan_shapes(model_shapes(*read_config(recipe.model.path)), recipe, device)


def simulated(recipe: Recipe, memory_bytes: int) -> tuple[Plan, Simulated]:
    plan = planned_for(recipe, memory_bytes)
    return plan, simulate(plan, recipe)


def test_what_is_planned_to_fit_runs_and_takes_what_was_planned(recipe: Recipe, tmp_path: Path) -> None:
    plan, found = simulated(recipe, 400 * MIB)
    assert found.refused is None and plan.fits
    needed = sum(plan.components.values()) - plan.components["runtime"]
    assert 0.99 * found.phases["train"] <= needed <= 1.03 * found.phases["train"]
    assert sum(found.components.values()) == found.phases["train"] > found.phases["eval"] > 0
    assert found.components[OTHER] < 0.02 * found.phases["train"]
    assert found.to_json()["fits"] is True
    assert not list(tmp_path.rglob("run"))


def test_running_out_says_where_and_who_held_the_memory(recipe: Recipe) -> None:
    _, whole = simulated(recipe, 400 * MIB)
    settings = recipe.memory.model_copy(update={"gradient_checkpointing": False, "activation_offload": False})
    _, found = simulated(recipe.model_copy(update={"memory": settings}), whole.phases["train"] // 2)
    assert found.refused is not None and found.place.partition(" ")[0] in ("forward", "backward", "loss")
    assert found.components["base_nf4"] > 0 and found.components["activations"] > 0
    assert found.to_json()["fits"] is False
    assert "OUT OF MEMORY in: " in found.lines(planned_for(recipe, 400 * MIB).components)[0]


def test_running_out_before_the_first_step_is_loading(recipe: Recipe) -> None:
    _, found = simulated(recipe, MIB)
    assert (found.place, found.phases) == ("loading", {})
