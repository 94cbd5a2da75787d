"""Names select what PEFT's select; sizes are those of the tensors that are trained."""

from __future__ import annotations

import pytest

from qlora_kit.errors import RecipeError
from qlora_kit.planning import components
from qlora_kit.planning.moments import training_moments
from qlora_kit.planning.planner import make_plan
from qlora_kit.planning.report import MOMENTS
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config
from qlora_kit.planning.stack_plan import plan_in_stack
from qlora_kit.planning.trained import trained_branches, trained_sizes, trained_whole
from qlora_kit.recipe import Recipe, recipe_for_model

LLAMA = "llama-3.1-8b"  # V 128256, h 4096


def shapes_of(name: str) -> ModelShapes:
    return model_shapes(*read_config(name))


def recipe(*overrides: str) -> Recipe:
    return recipe_for_model(LLAMA, overrides)


@pytest.mark.parametrize(
    ("model", "names", "count"),
    [
        (LLAMA, ["lm_head"], 1),
        (LLAMA, ["norm"], 65),  # two of each block and the last, as PEFT's endswith has it
        (LLAMA, ["model.norm"], 1),
        (LLAMA, ["layers.1.input_layernorm"], 1),
        ("gpt2", ["ln_1", "wpe"], 25),  # weight and bias
        ("qwen2.5-0.5b", ["lm_head"], 1),  # tied: a tensor of its own
    ],
)
def test_a_name_is_the_end_of_a_modules(model: str, names: list[str], count: int) -> None:
    assert len(trained_whole(shapes_of(model), names)) == count


@pytest.mark.parametrize(
    ("name", "message"),
    [("lm_haed", "did you mean 'lm_head'"), ("q_proj", "a linear of the decoder blocks"), ("self_attn", "there are")],
)
def test_a_name_that_selects_nothing_is_an_error(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"adapter.modules_to_save: '{name}'.*{message}"):
        trained_whole(shapes_of(LLAMA), [name])


def test_tables_get_a_branch_by_a_list_alone() -> None:
    shapes = shapes_of(LLAMA)
    assert trained_branches(shapes, ["q_proj", "lm_head"]) == ["lm_head"]
    assert trained_branches(shapes, "all-linear") == trained_branches(shapes, ".*") == []


def test_a_whole_table_is_counted_in_pieces() -> None:
    sizes = trained_sizes(shapes_of(LLAMA), recipe("adapter.modules_to_save=[lm_head]").adapter)
    assert sizes == {2048 * 4096: 62, (128256 - 62 * 2048) * 4096: 1}
    assert sum(size * count for size, count in sizes.items()) == 128256 * 4096


def test_the_plan_counts_them_in_adapter_gradients_and_optimizer() -> None:
    shapes, plain = shapes_of(LLAMA), recipe()
    for change, more in (
        ("adapter.modules_to_save=[embed_tokens, lm_head]", 2 * 128256 * 4096),
        (
            "adapter.target_modules=[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head]",
            16 * 132352,
        ),
    ):
        asked = recipe(change)
        for formula, each in ((components.adapter, 2), (components.gradients, 2), (components.trainable_parameters, 1)):
            assert formula(shapes, asked) - formula(shapes, plain) == each * more
        lower_and_moments = components.optimizer(shapes, asked) - components.optimizer(shapes, plain)
        assert 4 * more < lower_and_moments < 4.1 * more


@pytest.mark.parametrize(
    ("model", "names", "tables"),
    [
        (LLAMA, "lm_head", 1),
        (LLAMA, "embed_tokens, lm_head", 2),
        (LLAMA, "norm", 0),
        ("qwen2.5-0.5b", "lm_head", 0),  # tied: the embedding still needs it
        ("qwen2.5-0.5b", "embed_tokens, lm_head", 1),
    ],
)
def test_the_base_gives_up_its_own_of_a_whole_table(model: str, names: str, tables: int) -> None:
    shapes, asked = shapes_of(model), recipe(f"adapter.modules_to_save=[{names}]")
    less = components.base_unquantized(shapes, recipe()) - components.base_unquantized(shapes, asked)
    assert less == 2 * tables * shapes.vocabulary * shapes.hidden


def test_auto_leaves_a_whole_table_on_the_device_and_its_kin_with_lora_may_go() -> None:
    small = ("adapter.rank=8", "data.seq_len=256")
    whole = make_plan(recipe("adapter.modules_to_save=[lm_head]", *small), budget_bytes=6 << 30, gpu="rtx-4090")
    assert not whole.fits and whole.settings["memory"]["embeddings"] == "device"
    branch = recipe("adapter.target_modules=[q_proj, lm_head]", *small)
    away = make_plan(branch, budget_bytes=2 << 30, gpu="rtx-4090")
    assert away.fits and away.settings["memory"]["embeddings"] != "device"


def test_another_stack_is_not_asked_for_it() -> None:
    with pytest.raises(RecipeError, match="--stack peft: .*leave out adapter.modules_to_save"):
        plan_in_stack(recipe("adapter.modules_to_save=[norm]"), "peft")


def test_every_moment_has_words_in_the_report() -> None:
    asked = recipe("adapter.modules_to_save=[embed_tokens, lm_head]", "train.grad_accumulation=1")
    moments = training_moments(shapes_of(LLAMA), asked, 0)
    assert {"head backward", "embedding backward", "optimizer step"} <= moments.keys() <= MOMENTS.keys()
