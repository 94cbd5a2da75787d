"""Plans: closed forms, the contract's JSON, suggestions that were computed, and no heavy import."""

from __future__ import annotations

import json
import subprocess
import sys

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
        *("settings", "suggestions"),
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
    assert (settings.train.device, settings.memory.budget, settings.memory.placement) == ("cpu", GIB, "device")
    assert (settings.memory.loss_chunk_tokens, settings.train.optimizer) == (512, "adamw_8bit")


def test_the_peak_moves_from_the_loss_to_a_block_when_the_chunk_is_small() -> None:
    assert plan("qwen2.5-0.5b", "memory.loss_chunk_tokens=full").peak_moment == "loss"
    assert plan("qwen2.5-0.5b", "memory.loss_chunk_tokens=16").peak_moment == "block backward"


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
    ],
)
def test_a_switch_that_saves_memory_lowers_the_peak(smaller: str, larger: str) -> None:
    assert plan("qwen2.5-7b", smaller).peak_bytes < plan("qwen2.5-7b", larger).peak_bytes


def test_grad_accumulation_costs_no_memory() -> None:
    few, many = plan("llama-7b", "train.grad_accumulation=1"), plan("llama-7b", "train.grad_accumulation=64")
    assert few.peak_bytes == many.peak_bytes


# --------------------------------------------------------------------------------------------- suggestions

GREEDY = ("train.micro_batch=4", "memory.gradient_checkpointing=false", "memory.loss_chunk_tokens=full")


def options(suggestion: str) -> list[str]:
    return [word for word in suggestion.partition("   ")[0].split() if word != "--set"]


def test_a_plan_that_fits_suggests_nothing() -> None:
    assert plan("llama-2-7b", gib=23.5).fits
    assert plan("llama-2-7b", gib=23.5).suggestions == ()


@pytest.mark.parametrize("gib", [6, 8, 12, 20])
def test_every_suggested_line_fits_when_it_is_followed(gib: float) -> None:
    greedy = plan("llama-2-7b", *GREEDY, gib=gib)
    assert not greedy.fits
    assert greedy.suggestions
    assert all(plan("llama-2-7b", *GREEDY, *options(line), gib=gib).fits for line in greedy.suggestions)


def test_a_smaller_micro_batch_keeps_the_tokens_of_a_step() -> None:
    lines = plan("llama-2-7b", "train.micro_batch=16", "train.grad_accumulation=2", gib=8).suggestions
    assert any("--set train.micro_batch=1 --set train.grad_accumulation=32" in line for line in lines)


def test_an_unquantized_base_that_does_not_fit_is_told_of_nf4() -> None:
    recipe = ("model.quantization=none", "memory.placement=device")
    assert any("--set model.quantization=nf4" in line for line in plan("llama-2-7b", *recipe, gib=8).suggestions)


def test_what_cannot_fit_says_what_the_least_would_be() -> None:
    (line,) = plan("llama-3.1-405b", gib=2).suggestions
    assert "no change of these settings makes it fit: the least is" in line


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


# ------------------------------------------------------------------------------------------- placement


def test_what_fits_on_the_device_stays_there() -> None:
    assert (plan("llama-2-7b", gib=23.5).resident_blocks, plan("llama-2-7b", gib=23.5).streamed_blocks) == (32, 0)


@pytest.mark.parametrize(("model", "gib"), [("llama-3.1-70b", 22.5), ("llama-2-7b", 3), ("qwen2.5-32b", 12)])
def test_auto_keeps_as_many_blocks_on_the_device_as_fit_and_streams_the_rest(model: str, gib: float) -> None:
    made = plan(model, gib=gib)
    one_more = plan(model, f"memory.resident_blocks={made.resident_blocks + 1}", "memory.placement=disk", gib=gib)
    assert made.streamed_blocks > 0
    assert made.peak_bytes <= 0.95 * made.budget_bytes < one_more.peak_bytes


def test_blocks_on_the_host_are_counted_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kit.planning.planner.host_memory_bytes", lambda: 64 * GIB)
    made = plan("llama-3.1-70b", gib=22.5)
    assert made.settings["memory"]["placement"] == "host"
    per_block = 33 * GIB / 80
    assert made.phases["train"].host_bytes == pytest.approx(made.streamed_blocks * per_block, rel=0.02)


def test_without_enough_host_memory_blocks_stay_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kit.planning.planner.host_memory_bytes", lambda: 16 * GIB)
    assert plan("llama-3.1-70b", gib=22.5).settings["memory"]["placement"] == "disk"


def test_streaming_everything_leaves_what_the_device_must_hold() -> None:
    made = plan("llama-3.1-70b", "memory.placement=disk", "memory.resident_blocks=0", gib=22.5)
    assert made.components["base_nf4"] == 0
    assert made.peak_bytes < 9.5 * GIB
