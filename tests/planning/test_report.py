"""The printed plan: what a person must find in it."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from qlora_kit.planning.components import COMPONENTS
from qlora_kit.planning.moments import training_moments
from qlora_kit.planning.planner import Plan, make_plan
from qlora_kit.planning.report import (
    BAR_CELLS,
    MEANINGS,
    MOMENTS,
    bar,
    parameters_line,
    passage_line,
    placement_line,
    print_plan,
    room_line,
    time_line,
    verdict,
)
from qlora_kit.planning.room import Room
from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.planning.timing import Estimate
from qlora_kit.recipe import recipe_for_model
from qlora_kit.units import format_seconds


def plan(*overrides: str, gpu: str = "rtx-4090") -> Plan:
    return make_plan(recipe_for_model("llama-7b", overrides), gpu=gpu)


def printed(made: Plan, width: int = 100) -> str:
    output = io.StringIO()
    print_plan(made, Console(width=width, file=output))
    return output.getvalue()


@pytest.mark.parametrize(("part", "expected"), [(0, ""), (50, "█" * 12), (100, "█" * 24), (900, "█" * 24), (1, "▎")])
def test_a_bar_is_as_long_as_its_share(part: int, expected: str) -> None:
    assert bar(part, 100) == expected


def test_a_bar_of_nothing_is_empty() -> None:
    assert bar(5, 0) == ""


def test_the_report_shows_components_limit_verdict_parameters_and_next_step() -> None:
    text = printed(plan("adapter.rank=8", "adapter.target_modules=[q_proj, v_proj]"))
    for expected in ("base_nf4", "3.0 GiB", "total", "limit", "23.5 GiB", "fits: ", "next: qlora-kit train"):
        assert expected in text
    assert "4,194,304 of 6,742,609,920 (0.0622 %)" in text


def test_a_plan_that_does_not_fit_prints_the_lines_to_paste_unbroken() -> None:
    made = plan("train.micro_batch=8", "memory.gradient_checkpointing=false", gpu="rtx-3060-12gb")
    text = printed(made, width=60)
    assert "does not fit: " in text
    assert f"fits with: {made.suggestions[0]}" in text


def test_bars_of_a_plan_that_does_not_fit_show_how_far_it_is() -> None:
    made = make_plan(recipe_for_model("llama-3.1-70b", ["memory.placement=device"]), gpu="rtx-4090")
    lines = {line.split()[0]: line for line in printed(made).splitlines() if line.split()}
    assert lines["total"].count("█") == BAR_CELLS > lines["limit"].count("█") > 0


def test_where_blocks_and_embeddings_live_is_said() -> None:
    settings = ["memory.placement=disk", "memory.resident_blocks=3", "memory.host_blocks=5", "memory.embeddings=host"]
    made = make_plan(recipe_for_model("llama-3.1-70b", settings), gpu="rtx-4090")
    where = (
        "blocks: 3 on the device, 5 streamed from host memory, 72 streamed from disk; embedding and head in host memory"
    )
    assert placement_line(made) == where
    assert placement_line(plan()) == "blocks: 32 on the device"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("keep_dequantized=false",), "32 of 32 blocks recomputed in backward; one micro-batch at a time"),
        (
            ("gradient_checkpointing=5", "keep_dequantized=true"),
            "5 of 32 blocks recomputed in backward; a block's weights",
        ),
        (("activation_offload=disk",), "; their inputs on disk; "),
        (("micro_batches_together=4",), "; 4 micro-batches pass a block together"),
    ],
)
def test_how_the_blocks_are_passed_is_said(settings: tuple[str, ...], line: str) -> None:
    made = plan("data.seq_len=2048", *(f"memory.{setting}" for setting in settings))
    assert line in passage_line(made)
    assert passage_line(made) in printed(made, width=300)


def test_the_time_of_a_step_and_of_the_run_is_said_where_it_is_known() -> None:
    made = plan("train.steps=100", "train.grad_accumulation=4")
    assert made.estimated is not None
    step, run = format_seconds(made.estimated.step_s), format_seconds(100 * made.estimated.step_s)
    line = f"time: about {step} a step of 4,096 tokens, {run} the run (estimated, bound by compute)"
    assert time_line(made) == line and line in printed(made)
    assert ", bound by transfers)" in str(time_line(replace(made, estimated=Estimate(1.0, 2.0, None))))
    assert time_line(replace(made, estimated=None)) is None


def test_the_room_is_said_and_only_where_there_is_some() -> None:
    made = replace(plan(), room=Room(4096, 5))
    assert room_line(made) == "room: up to data.seq_len=4096 or train.micro_batch=5 would fit"
    assert "room: " not in printed(plan("memory.placement=device", "train.micro_batch=64", gpu="rtx-3050-8gb"))


@pytest.mark.parametrize("model", ["llama-3.1-70b", "smollm2-135m"])
def test_a_plan_is_read_on_one_screen(model: str) -> None:
    lines = printed(make_plan(recipe_for_model(model), gpu="rtx-4090"), width=80).splitlines()
    assert len(lines) <= 34
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_the_next_step_can_be_another() -> None:
    output = io.StringIO()
    print_plan(plan(), Console(width=100, file=output), next_step="qlora-kit recipes copy x my.yaml")
    assert output.getvalue().endswith("next: qlora-kit recipes copy x my.yaml\n")


def test_every_component_and_moment_is_explained() -> None:
    assert tuple(MEANINGS) == COMPONENTS
    for recomputed in ("true", "false", "3"):
        recipe = recipe_for_model("llama-7b", [f"memory.gradient_checkpointing={recomputed}"])
        assert training_moments(model_shapes(*read_config("llama-7b")), recipe, 0).keys() <= MOMENTS.keys()


def test_a_name_with_brackets_is_printed_as_it_is() -> None:
    made = plan()
    made.settings["model"]["path"] = "my[bold]model"
    assert "my[bold]model" in printed(made)


def test_lines_for_other_printers_say_the_same() -> None:
    assert verdict(plan()).startswith("fits: ")
    assert parameters_line(plan()).endswith("(0.5898 %)")
