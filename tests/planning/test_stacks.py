"""Other stacks: closed forms of what their sources keep, every row on every architecture, and the contract's JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qlora_kit.architectures import ARCHITECTURES, PLANNED_ONLY
from qlora_kit.errors import ModelError
from qlora_kit.planning.components import COMPONENTS
from qlora_kit.planning.hardware import GIB, Device
from qlora_kit.planning.moments import total
from qlora_kit.planning.planner import make_plan, plan_shapes
from qlora_kit.planning.report import MOMENTS, stack_line
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config
from qlora_kit.planning.stack_moments import BATCH_BYTES, in_stack, stack_moments, stack_peak, static_ledger
from qlora_kit.planning.stack_plan import plan_in_stack, plan_shapes_in_stack
from qlora_kit.planning.stacks import PUBLISHED, STACKS, Stack, find_stack
from qlora_kit.recipe import Recipe, recipe_for_model

ATTENTION = "adapter.target_modules=[q_proj, k_proj, v_proj, o_proj]"
PACKED = ("data.seq_len=4096", "data.packing=false", "adapter.dropout=0.1", "train.grad_accumulation=1")
GATED = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 1000,
}
GPT2 = {"n_embd": 256, "n_layer": 3, "n_head": 8, "vocab_size": 1000}
MIXTRAL = {"model_type": "mixtral", **GATED}


def shapes_of(name: str) -> ModelShapes:
    return model_shapes(*read_config(name))


def small(model_type: str) -> ModelShapes:
    config = GPT2 if model_type in ("gpt2", "gpt_bigcode") else GATED
    return model_shapes({"model_type": model_type, **config}, "test", planned_only=True)


def recipe(*overrides: str, targets: str = ATTENTION) -> Recipe:
    return recipe_for_model("llama-2-7b", (*PACKED, targets, *overrides))


def slope(shapes: ModelShapes, stack: Stack, *overrides: str) -> int:
    """Bytes a token of the peak, the batch not counted: from 4 to 8 sequences."""
    peaks = []
    for count in (4, 8):
        wanted = in_stack(recipe(f"train.micro_batch={count}", *overrides), stack)
        peaks.append(total(stack_peak(shapes, wanted, stack, 0)[1]))
    return (peaks[1] - peaks[0]) // (4 * 4096) - BATCH_BYTES


# -------------------------------------------------------------------------- closed forms, derived in docs/memory.md


@pytest.mark.parametrize(
    ("stack", "bytes_a_logit", "hidden_values"),
    [("tf4.48", 14, 6), ("tf4.45", 12, 6), ("tf4.48-foak", 10, 4), ("tf4.48-kbit", 14, 6)],
)
def test_at_the_loss_a_token_takes_block_inputs_logits_and_the_final_norm(
    stack: str, bytes_a_logit: int, hidden_values: int
) -> None:
    inputs = 2 * 32 * 4096 * (2 if "kbit" in stack else 1)
    expected = inputs + bytes_a_logit * 32000 + hidden_values * 4096
    assert slope(shapes_of("mistral-7b-v0.1"), PUBLISHED[stack]) == expected


def test_with_a_fused_loss_one_block_is_the_peak_at_63_bytes_a_hidden_value() -> None:
    found = slope(shapes_of("llama-3-8b"), PUBLISHED["tf4.45-foak-liger"])
    assert found == 2 * 32 * 4096 + 63 * 4096 + 4 * 32  # log-sum-exp of 32 heads


def test_mistrals_repeated_heads_cost_three_bytes_a_hidden_value_more() -> None:
    stack = PUBLISHED["tf4.45-foak-liger"]
    assert slope(shapes_of("mistral-7b-v0.1"), stack) - slope(shapes_of("llama-3-8b"), stack) == 3 * 4096


def test_a_70b_has_its_peak_in_one_block_at_70_6_bytes_a_hidden_value() -> None:
    found = slope(shapes_of("llama-2-70b"), PUBLISHED["tf4.48"])
    branches, log_sum_exp = 4 * 16 * 2, 64 * 4
    assert found - branches - log_sum_exp == 2 * 80 * 8192 + 70.5 * 8192


def test_experts_keep_what_their_tokens_pass_and_one_of_them_is_in_backward() -> None:
    dense, experts = small("mistral"), small("mixtral")
    stack = PUBLISHED["tf4.45-foak-liger"]
    inner, hidden = 640, 256
    saved = 2 * ((2 - 1) * 3 * inner + 2 * hidden)
    gradients = 2 * (3 * inner + 2 * hidden) * 2 // 8 - 2 * 3 * inner
    repeated = 2 * 2 * (256 - 128)  # keys and values, in Mistral only
    assert slope(experts, stack) - slope(dense, stack) == saved + gradients - repeated


def test_litgpt_keeps_45_bytes_a_hidden_value_and_layer_of_llama_2() -> None:
    shapes, stack = shapes_of("llama-2-7b"), PUBLISHED["litgpt-longest-first"]
    peaks = []
    for count in (1, 2):
        wanted = in_stack(
            recipe(
                f"train.micro_batch={count}",
                "data.seq_len=1304",
                "model.quantization=none",
                "adapter.rank=8",
                targets="adapter.target_modules=[q_proj, v_proj]",
            ),
            stack,
        )
        peaks.append(total(stack_peak(shapes, wanted, stack, 0)[1]))
    assert (peaks[1] - peaks[0]) / 1304 / 32 / 4096 == pytest.approx(45.46, rel=0.003)  # published: 186.2 kB


def test_bitsandbytes_before_0_43_2_keeps_the_inputs_of_4_bit_products() -> None:
    stack = PUBLISHED["tf4.48-foak"]
    kept = 2 * 32 * (3 * 4096 + 14336)
    shapes = shapes_of("mistral-7b-v0.1")
    assert slope(shapes, replace(stack, keeps_inputs=True)) - slope(shapes, stack) == kept


def test_paged_state_is_outside_litgpts_count() -> None:
    shapes, stack = shapes_of("llama-2-7b"), STACKS["litgpt"]
    paged, unpaged = (
        static_ledger(shapes, in_stack(recipe(f"train.optimizer={name}"), stack), stack, 0)["optimizer"]
        for name in ("paged_adamw_32bit", "adamw_32bit")
    )
    assert (paged, unpaged) == (0, 8 * 32 * 8 * 4096 * 16)


def test_adapters_are_fp32_and_k_bit_preparation_doubles_embedding_and_head() -> None:
    shapes = shapes_of("llama-2-7b")
    wanted = in_stack(recipe(), STACKS["peft"])
    ledger = static_ledger(shapes, wanted, STACKS["peft"], 0)
    assert ledger["adapter"] == 4 * 32 * 8 * 4096 * 16
    assert ledger["base_unquantized"] == 4 * shapes.other_parameters


# ------------------------------------------------------------------------------------------- every row, every model


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *PLANNED_ONLY])
@pytest.mark.parametrize("stack", [*STACKS, *PUBLISHED])
def test_every_stack_answers_for_every_architecture(stack: str, model_type: str) -> None:
    shapes, row = small(model_type), find_stack(stack)
    for overrides in ((), ("model.quantization=none",), ("memory.gradient_checkpointing=false", "adapter.dropout=0")):
        wanted = in_stack(recipe(*overrides, targets="adapter.target_modules=all-linear"), row)
        for name, ledger in stack_moments(shapes, wanted, row, 0).items():
            assert name in MOMENTS
            assert tuple(ledger) == COMPONENTS
            assert all(type(count) is int and count >= 0 for count in ledger.values())
        assert total(stack_peak(shapes, wanted, row, 0)[1]) > total(static_ledger(shapes, wanted, row, 0))


@pytest.mark.parametrize("stack", ["peft", "peft-liger", "tf4.48", "tf4.48-kbit"])
def test_recomputation_is_of_all_blocks_or_none_and_lowers_the_peak(stack: str) -> None:
    shapes, row = shapes_of("llama-3.1-8b"), find_stack(stack)
    all_of_them, some, none = (
        total(stack_peak(shapes, in_stack(recipe(f"memory.gradient_checkpointing={wanted}"), row), row, 0)[1])
        for wanted in ("auto", 16, "false")
    )
    assert all_of_them == some < none


def test_capped_logits_leave_two_bytes_more() -> None:
    shapes, stack = shapes_of("gemma-2-2b"), STACKS["peft"]
    capped, plain = (
        stack_moments(shape, in_stack(recipe(), stack), stack, 0)["loss"]["logits"]
        for shape in (shapes, replace(shapes, softcap=None))
    )
    assert capped - plain == 2 * 4096 * shapes.vocabulary


# --------------------------------------------------------------------------------------------------------- the plan


def test_json_is_the_contracts_with_the_stack_and_this_kits_peak() -> None:
    wanted = recipe_for_model("llama-3.1-8b")
    kit = make_plan(wanted, gpu="rtx-4090")
    made = json.loads(json.dumps(plan_in_stack(wanted, "peft", gpu="rtx-4090").to_json()))
    assert list(made) == [*kit.to_json(), "stack", "kit_peak_bytes"]
    assert (made["stack"], made["kit_peak_bytes"]) == ("peft", kit.peak_bytes)
    assert sum(made["components"].values()) == made["phases"]["train"]["device_bytes"]
    assert Recipe.model_validate(made["settings"]).memory.placement == "device"


def test_the_report_compares_the_two() -> None:
    device = Device("cuda", "card", 24 * GIB)
    plan = plan_shapes_in_stack(shapes_of("llama-3.1-8b"), recipe_for_model("llama-3.1-8b"), "peft", device)
    assert "this kit" in stack_line(plan)
    assert "times as much" in stack_line(plan)


def test_a_model_that_only_others_train_is_planned_for_them_and_refused_here() -> None:
    with pytest.raises(ModelError, match="cannot be trained by this kit; `qlora-kit plan --stack peft`"):
        model_shapes(MIXTRAL, "config.json")
    shapes = model_shapes(MIXTRAL, "config.json", planned_only=True)
    plan = plan_shapes_in_stack(shapes, recipe_for_model("m"), "peft", Device("cuda", "card", GIB))
    assert plan.kit_peak_bytes is None
    assert "this kit cannot train this model" in stack_line(plan)


def test_mixtral_8x7b_has_46_7_billion_parameters_and_santacoder_1_1() -> None:
    mixtral = GATED | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    shapes = model_shapes({"model_type": "mixtral", **mixtral, **heads}, "test", planned_only=True)
    assert shapes.total_parameters == 46_702_792_704
    santacoder = {"n_embd": 2048, "n_layer": 24, "n_head": 16, "vocab_size": 49280, "n_positions": 2048}
    found = model_shapes({"model_type": "gpt_bigcode", **santacoder}, "test", planned_only=True)
    assert found.total_parameters == 1_124_886_528


@pytest.mark.parametrize("stack", STACKS)
def test_an_8b_on_8_gib_fits_here_and_nowhere_else(stack: str) -> None:
    shapes, card = shapes_of("llama-3.1-8b"), Device("cuda", "card", 8 * GIB)
    wanted = recipe_for_model("llama-3.1-8b", ("data.seq_len=4096",))
    assert plan_shapes(shapes, wanted, card).fits
    assert not plan_shapes_in_stack(shapes, wanted, stack, card).fits
