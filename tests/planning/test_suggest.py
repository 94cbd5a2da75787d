"""Suggestions were planned: a line that is followed fits."""

from __future__ import annotations

import pytest

from qlora_kit.planning.hardware import Device
from qlora_kit.planning.planner import Plan, make_plan
from qlora_kit.planning.suggest import Cost, single_changes, suggestions
from qlora_kit.recipe import Recipe, recipe_for_model

GIB = 2**30


def plan(model: str, *overrides: str, gib: float = 1000) -> Plan:
    return make_plan(recipe_for_model(model, ("train.device=cuda", *overrides)), budget_bytes=int(gib * GIB))


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
    asked = ("train.micro_batch=16", "train.grad_accumulation=2")
    (line,) = [line for line in plan("llama-2-7b", *asked, gib=8).suggestions if "train.micro_batch=" in line]
    rows, micro_batches = (int(option.partition("=")[2]) for option in options(line))
    assert rows < 16 and rows * micro_batches == 32
    assert not plan("llama-2-7b", *asked, *options(f"train.micro_batch={2 * rows}"), gib=8).fits


def test_the_longest_rows_that_fit_are_suggested_not_just_half_as_long_ones() -> None:
    asked = ("data.seq_len=8192", "memory.placement=device", "memory.embeddings=device", "train.micro_batch=2")
    (line,) = [line for line in plan("llama-2-7b", *asked, gib=8).suggestions if "data.seq_len=" in line]
    (option,) = options(line)
    seq_len = int(option.partition("=")[2])
    assert seq_len % 256 == 0 and seq_len.bit_count() > 1
    assert not plan("llama-2-7b", *asked, f"data.seq_len={seq_len + 256}", gib=8).fits


def test_an_unquantized_base_that_does_not_fit_is_told_of_nf4() -> None:
    recipe = ("model.quantization=none", "memory.placement=device")
    assert any("--set model.quantization=nf4" in line for line in plan("llama-2-7b", *recipe, gib=8).suggestions)


def test_what_cannot_fit_says_what_the_least_would_be() -> None:
    (line,) = plan("llama-3.1-405b", gib=2).suggestions
    assert "no change of these settings makes it fit: the least is" in line


@pytest.mark.parametrize(
    ("given", "suggested"),
    [
        ("memory.placement=device", "--set memory.placement=auto"),
        ("memory.resident_blocks=30", "--set memory.resident_blocks=auto"),
        ("memory.keep_dequantized=true", "--set memory.keep_dequantized=auto"),
        ("memory.gradient_checkpointing=8", "--set memory.gradient_checkpointing=auto"),
        ("memory.micro_batches_together=8", "--set memory.micro_batches_together=auto"),
        ("data.seq_len=3072", "--set memory.activation_offload=host"),
    ],
)
def test_a_switch_that_is_the_reason_is_suggested(given: str, suggested: str) -> None:
    tight = ("memory.placement=host", "data.seq_len=2048", "memory.embeddings=host")
    fits, greedy = plan("llama-2-7b", *tight, gib=2.2), plan("llama-2-7b", *tight, given, gib=2.2)
    assert fits.fits and not greedy.fits
    assert any(line.startswith(suggested) for line in greedy.suggestions), greedy.suggestions


def test_embeddings_that_must_stay_are_told_that_they_need_not() -> None:
    greedy = plan("llama-3.1-70b", "memory.embeddings=device", "data.seq_len=512", gib=7)
    assert any(line.startswith("--set memory.embeddings=auto") for line in greedy.suggestions)


# ------------------------------------------------------------------------------------------------ what they cost


def costs(**seconds: float) -> list[str]:
    """Suggestions where every change fits and takes the seconds a token that its key has here, else 1."""

    def cost(recipe: Recipe) -> Cost:
        given = {"offload": recipe.memory.activation_offload, "rows": recipe.train.micro_batch == 1}
        given |= {"length": recipe.data.seq_len < 1024, "optimizer": recipe.train.optimizer != "adamw_32bit"}
        changed_keys = [key for key, there in given.items() if there]
        peak = 10 * GIB - GIB * len(changed_keys)
        return Cost(peak, seconds.get(changed_keys[0], 1.0) if changed_keys else 1.0)

    recipe = recipe_for_model("llama-7b", ["train.micro_batch=2", "train.optimizer=adamw_32bit"])
    return suggestions(recipe, single_changes(recipe), Device("cuda", "card", 9 * GIB), cost(recipe), cost)


def test_each_says_what_it_saves_and_what_time_it_costs() -> None:
    first, *_ = costs(offload=1.06, rows=1.25)
    assert first == "--set memory.activation_offload=host   (saves 1.0 GiB, +6 % time: 9.0 GiB at the peak)"


def test_what_changes_nothing_that_is_learned_comes_first_then_what_costs_least_time() -> None:
    keys = [line.split()[1].partition("=")[0] for line in costs(offload=1.3, rows=1.1, optimizer=1.0, length=0.5)]
    assert keys == ["train.micro_batch", "memory.activation_offload", "train.optimizer", "data.seq_len"]


def test_where_no_rates_are_known_no_time_is_said() -> None:
    greedy = plan("llama-2-7b", *GREEDY, gib=12)
    assert all("saves" in line and "time" not in line for line in greedy.suggestions)


def test_a_known_card_has_a_time_for_each() -> None:
    made = make_plan(recipe_for_model("llama-2-7b", [*GREEDY]), gpu="rtx-3060-12gb")
    assert made.suggestions
    assert all(" % time: " in line for line in made.suggestions)
