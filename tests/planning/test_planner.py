"""Plans: closed forms, the contract's JSON, suggestions that were computed, and no heavy import."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from qlora_kit.errors import ModelError, RecipeError
from qlora_kit.planning.components import COMPONENTS
from qlora_kit.planning.planner import Plan, make_plan
from qlora_kit.recipe import Recipe, recipe_for_model

GIB = 2**30


def plan(model: str, *overrides: str, gib: float = 1000) -> Plan:
    return make_plan(recipe_for_model(model, ("train.device=cuda", *overrides)), budget_bytes=int(gib * GIB))


def test_llama_7b_rank_8_on_q_and_v_is_0_0622_percent() -> None:
    made = plan("llama-7b", "adapter.rank=8", "adapter.target_modules=[q_proj, v_proj]")
    assert (made.trainable_parameters, made.total_parameters) == (4_194_304, 6_742_609_920)
    assert f"{made.trainable_percent:.4f}" == "0.0622"


def test_llama_3_1_70b_in_nf4_is_32_9_gib_and_what_stays_unquantized_3_9() -> None:
    parts = plan("llama-3.1-70b").components
    assert f"{(parts['base_nf4'] + parts['quant_constants']) / GIB:.1f}" == "32.9"
    assert f"{parts['base_unquantized'] / GIB:.1f}" == "3.9"


def test_json_has_the_keys_of_the_contract_in_its_order() -> None:
    made = json.loads(json.dumps(plan("llama-2-7b").to_json()))
    assert list(made) == [
        *("schema", "fits", "budget_bytes", "peak_bytes", "peak_phase", "components", "phases"),
        *("trainable_parameters", "total_parameters", "trainable_percent", "resident_blocks", "streamed_blocks"),
        *("settings", "suggestions", "estimated", "room", "roomy"),
    ]
    assert tuple(made["components"]) == COMPONENTS
    assert list(made["phases"]) == ["load", "train", "eval", "save", "merge"]
    assert all(list(phase) == ["device_bytes", "host_bytes", "disk_bytes"] for phase in made["phases"].values())


def test_components_add_up_to_the_training_phase() -> None:
    made = plan("qwen2.5-7b")
    assert sum(made.components.values()) == made.phases["train"].device_bytes == made.peak_bytes
    assert made.peak_phase == "train"


def test_every_number_of_a_plan_is_a_whole_number_of_bytes() -> None:
    made = plan("gemma-2-2b", "memory.activation_offload=true", "adapter.rank=7").to_json()
    numbers = [*made["components"].values(), *(n for phase in made["phases"].values() for n in phase.values())]
    assert all(type(number) is int and number >= 0 for number in numbers)


def test_settings_are_a_recipe_with_every_auto_decided() -> None:
    made = make_plan(recipe_for_model("llama-7b", ["train.device=cpu"]), budget_bytes=GIB)
    settings = Recipe.model_validate(made.settings)
    assert (settings.train.device, settings.memory.budget, settings.memory.placement) == ("cpu", GIB, "disk")
    assert (settings.memory.loss_chunk_tokens, settings.train.optimizer) == (512, "adamw_8bit")
    assert "auto" not in settings.memory.model_dump().values()


def test_the_recipe_that_runs_has_everything_that_was_decided_but_the_budget() -> None:
    recipe = recipe_for_model("llama-3.1-70b", ["train.device=cuda", "memory.gradient_checkpointing=auto"])
    made = make_plan(recipe, budget_bytes=20 * GIB)
    runs, user = (
        made.placed(recipe).memory.model_dump(),
        dict.fromkeys(("budget", "loss_chunk_tokens", "mlp_tile_tokens"), "auto"),
    )
    assert runs == made.settings["memory"] | user
    assert runs["resident_blocks"] == made.resident_blocks > 0
    assert made.placed(recipe).train == recipe.train


def test_a_plan_of_what_was_decided_is_the_same_plan() -> None:
    recipe = recipe_for_model("llama-3.1-8b", ["train.device=cuda", "memory.gradient_checkpointing=auto"])
    made = make_plan(recipe, budget_bytes=12 * GIB)
    again = make_plan(made.placed(recipe), budget_bytes=12 * GIB)
    assert replace(again, room=made.room) == made  # there, blocks that stay resident take room


def test_the_peak_moves_from_the_loss_to_a_block_when_the_chunk_is_small() -> None:
    assert plan("qwen2.5-0.5b", "memory.loss_chunk_tokens=full").peak_moment == "loss"
    assert plan("qwen2.5-0.5b", "memory.loss_chunk_tokens=16").peak_moment == "block backward"
    kept = ("memory.loss_chunk_tokens=16", "memory.gradient_checkpointing=false")
    assert plan("llama-2-7b", *kept).peak_moment == "final norm"


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [
        ("data.seq_len=512", "data.seq_len=1024"),
        ("train.micro_batch=1", "train.micro_batch=2"),
        ("adapter.rank=8", "adapter.rank=64"),
        ("model.quantization=nf4", "model.quantization=none"),
        ("model.double_quant=true", "model.double_quant=false"),
        ("memory.gradient_checkpointing=true", "memory.gradient_checkpointing=false"),
        ("train.optimizer=adamw_8bit", "train.optimizer=adamw_32bit"),
        ("memory.activation_offload=true", "memory.activation_offload=false"),
        ("memory.gradient_checkpointing=20", "memory.gradient_checkpointing=10"),
        ("memory.keep_dequantized=false", "memory.keep_dequantized=true"),
        ("memory.micro_batches_together=1", "memory.micro_batches_together=2"),
        ("memory.embeddings=host", "memory.embeddings=device"),
        ("memory.resident_blocks=0", "memory.resident_blocks=28"),
    ],
)
def test_a_switch_that_saves_memory_lowers_the_peak(smaller: str, larger: str) -> None:
    settings = ("memory.placement=host", "memory.micro_batches_together=1") if "resident" in smaller else ()
    assert plan("qwen2.5-7b", *settings, smaller).peak_bytes < plan("qwen2.5-7b", *settings, larger).peak_bytes


def test_grad_accumulation_costs_no_memory_but_the_gradients_that_wait() -> None:
    one, two, many = (plan("llama-7b", f"train.grad_accumulation={count}") for count in (1, 2, 64))
    assert two.peak_bytes == many.peak_bytes
    assert many.peak_bytes - one.peak_bytes == pytest.approx(many.components["gradients"] * 31 / 32, abs=1)


# ------------------------------------------------------------------------------------------- budget, errors


def test_the_budget_of_the_command_goes_before_that_of_the_recipe() -> None:
    recipe = recipe_for_model("llama-7b", ["memory.budget=8GiB", "train.device=cpu"])
    assert make_plan(recipe).budget_bytes == 8 * GIB
    assert make_plan(recipe, budget_bytes=3 * GIB).budget_bytes == 3 * GIB


def test_a_card_brings_its_memory_and_the_runtime_component() -> None:
    made = make_plan(recipe_for_model("llama-2-7b"), gpu="rtx-3060-12gb")
    assert 11 * GIB < made.budget_bytes < 12 * GIB
    assert made.components["runtime"] > 0


def test_a_wrong_target_or_model_is_one_error() -> None:
    with pytest.raises(RecipeError, match="did you mean 'q_proj'"):
        plan("llama-7b", "adapter.target_modules=[q_prj]")
    with pytest.raises(ModelError, match="no such folder"):
        plan("./nothing-here")


# ------------------------------------------------------------------------------------------------- imports

CHILD = """
import sys
from qlora_kit.planning.planner import make_plan
from qlora_kit.planning.report import print_plan, verdict
from qlora_kit.recipe import recipe_for_model
print(verdict(make_plan(recipe_for_model("llama-2-7b"), gpu="rtx-4090")))
heavy = {"torch", "transformers", "bitsandbytes", "numpy", "huggingface_hub", "rich", "peft"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_plan_imports_nothing_heavy() -> None:
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("fits: ")
