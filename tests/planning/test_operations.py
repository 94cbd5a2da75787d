"""What a step computes, by hand; `tests/tools/test_floor.py` holds the counts to a step of the real code."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_kit.planning.operations import count_products, dequantizations
from qlora_kit.planning.quantities import recomputed_blocks
from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.planning.suggest import changed
from qlora_kit.recipe import recipe_for_model

TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": False}
SHAPES = model_shapes(TINY, "tiny")
RECIPE = recipe_for_model("tiny", ["data.seq_len=64", "adapter.rank=4", "train.grad_accumulation=1"])


def operations(model: str, *overrides: str) -> dict[str, float]:
    """Of each part, for one micro-batch."""
    shapes, recipe = model_shapes(*read_config(model)), recipe_for_model(model, overrides)
    work = count_products(shapes, recipe)
    return {part: sum(n * product.operations for product, n in products.items()) for part, products in work.items()}


def test_forward_and_backward_take_two_operations_a_weight_and_token() -> None:
    shapes, parts = model_shapes(*read_config("llama-3.1-8b")), operations("llama-3.1-8b", "data.seq_len=256")
    weights = shapes.layers * shapes.block_linear_parameters
    of_no_gradient = sum(shapes.linear(name).weights for name in shapes.architecture.attention_in)
    of_no_output = shapes.layers * shapes.linear(shapes.architecture.mlp_out).weights
    assert parts["forward"] == 2 * 256 * weights
    assert parts["backward"] == 2 * 256 * (weights - of_no_gradient)
    assert parts["recomputation"] == 2 * 256 * (weights - of_no_output)
    assert parts["head"] == 2 * 2 * 255 * shapes.vocabulary * shapes.hidden


def test_a_branch_takes_three_products_each_of_a_and_b_and_what_is_recomputed() -> None:
    forward_and_backward = ("adapter.rank=16", "memory.gradient_checkpointing=false")
    one = ("data.seq_len=128", "adapter.target_modules=[down_proj]")
    down = model_shapes(*read_config("llama-2-7b")).linear("mlp.down_proj")
    sides = 32 * (down.in_features + down.out_features)
    assert operations("llama-2-7b", *one, *forward_and_backward)["adapter"] == 3 * 2 * 128 * 16 * sides


def test_only_the_first_blocks_are_recomputed() -> None:
    some = {"memory.gradient_checkpointing": 1, "adapter.target_modules": r".*\.0\..*"}
    late = {"memory.gradient_checkpointing": 1, "adapter.target_modules": r".*\.2\..*"}
    first, last = (count_products(SHAPES, changed(RECIPE, change))["adapter"] for change in (some, late))
    assert recomputed_blocks(SHAPES, changed(RECIPE, some)) == 1
    assert sum(first.values()) > sum(last.values())


def test_attention_of_a_row_is_half_of_its_square() -> None:
    attention = count_products(SHAPES, RECIPE)["attention"]
    square = 2 * 64 * 64 * 64  # operations of Q K^T: tokens x tokens x (heads x width)
    passes = 2 + 2 + 4  # products forward, recomputed, backward
    assert sum(count * product.operations for product, count in attention.items()) == 3 * passes * square / 2


@pytest.mark.parametrize(
    ("changes", "uses"),
    [
        ({"memory.gradient_checkpointing": False}, 2),
        ({"memory.keep_dequantized": True}, 2),
        ({"memory.keep_dequantized": False}, 3),
        ({"memory.keep_dequantized": False, "train.grad_accumulation": 4, "memory.micro_batches_together": 1}, 12),
        ({"memory.keep_dequantized": False, "train.grad_accumulation": 4, "memory.micro_batches_together": 4}, 3),
    ],
)
def test_weights_are_dequantized_as_often_as_their_values_are_needed(changes: dict[str, Any], uses: int) -> None:
    assert dequantizations(SHAPES, changed(RECIPE, changes))[192, 64] == 2 * 3 * uses  # gate and up, three blocks
