"""What switches make of all blocks' activations, against closed forms."""

from __future__ import annotations

import pytest

from qlora_kit.planning import activations
from qlora_kit.planning.block import block_saved
from qlora_kit.planning.quantities import hidden_state
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config
from qlora_kit.recipe import Recipe, recipe_for_model


def shapes_of(name: str) -> ModelShapes:
    return model_shapes(*read_config(name))


def recipe_with(*overrides: str) -> Recipe:
    return recipe_for_model("llama-7b", overrides)


@pytest.mark.parametrize("together", [1, 3])
def test_block_inputs_are_two_bytes_a_token_hidden_layer_and_micro_batch(together: int) -> None:
    recipe = recipe_with("data.seq_len=100", f"memory.micro_batches_together={together}")
    assert activations.block_inputs(shapes_of("llama-7b"), recipe, 32) == together * 2 * 32 * 4096 * 100


def test_micro_batches_that_pass_together_are_at_most_those_of_a_step() -> None:
    shapes, few = shapes_of("llama-7b"), ("train.grad_accumulation=2", "memory.micro_batches_together=8")
    as_many = activations.kept_activations(shapes, recipe_with("memory.micro_batches_together=2"))
    assert activations.kept_activations(shapes, recipe_with(*few)) == as_many


@pytest.mark.parametrize("recomputed", [0, 5, 32])
def test_kept_blocks_keep_all_they_save_and_the_output_of_the_last(recomputed: int) -> None:
    shapes, recipe = shapes_of("llama-7b"), recipe_with(f"memory.gradient_checkpointing={recomputed}")
    state, kept = hidden_state(shapes, recipe), 32 - recomputed
    expected = 32 * state + kept * block_saved(shapes, recipe) + (state if kept else 0)
    found = activations.kept_activations(shapes, recipe) - activations.call_arguments(shapes, recipe)
    assert found == expected


def test_a_number_of_blocks_is_what_true_and_false_stand_for() -> None:
    shapes = shapes_of("llama-7b")
    for word, number in (("true", 32), ("true", 99), ("false", 0), ("auto", 32)):
        one, other = (recipe_with(f"memory.gradient_checkpointing={value}") for value in (word, number))
        assert activations.kept_activations(shapes, one) == activations.kept_activations(shapes, other)


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("together", [1, 4])
def test_offload_leaves_two_inputs_on_the_device(tier: str, together: int) -> None:
    settings = (f"memory.activation_offload={tier}", f"memory.micro_batches_together={together}")
    shapes, recipe = shapes_of("llama-7b"), recipe_with(*settings)
    state = hidden_state(shapes, recipe)
    assert activations.recomputed_inputs(shapes, recipe, 32) == 2 * state
    assert activations.offloaded_inputs(shapes, recipe, tier) == 32 * together * state  # a power of two already


def test_offloaded_inputs_are_those_of_recomputed_blocks() -> None:
    settings = ("memory.activation_offload=disk", "memory.gradient_checkpointing=10", "data.seq_len=100")
    shapes, recipe = shapes_of("llama-7b"), recipe_with(*settings)
    assert activations.offloaded_inputs(shapes, recipe, "disk") == 10 * 100 * 4096 * 2
    assert activations.offloaded_inputs(shapes, recipe, "host") == 0


def test_offload_takes_host_memory_in_slabs_of_a_power_of_two() -> None:
    settings = ("memory.activation_offload=host", "memory.gradient_checkpointing=10", "data.seq_len=5")
    room, slab = 40_960, 1 << 18  # 5 x 4096 bf16 values; four of them are less than 256 KiB, six are not
    assert 4 * room < slab < 7 * room
    assert activations.offloaded_inputs(shapes_of("llama-7b"), recipe_with(*settings), "host") == 2 * slab
