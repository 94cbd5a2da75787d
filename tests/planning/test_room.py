"""How far a recipe could go is exactly as far as a plan of it still fits."""

from __future__ import annotations

import pytest

from qlora_kit.planning.planner import make_plan
from qlora_kit.planning.room import MICRO_BATCH_LIMIT, SEQ_LEN_STEP, largest
from qlora_kit.planning.suggest import changed
from qlora_kit.recipe import recipe_for_model

GIB = 2**30


@pytest.mark.parametrize(
    ("model", "overrides", "gib"),
    [
        ("llama-3.1-70b", (), 23.5),
        ("qwen2.5-7b", ("memory.placement=device", "data.packing=false"), 12),
        ("gemma-2-2b", ("memory.gradient_checkpointing=auto", "memory.activation_offload=host"), 8),
        ("qwen2.5-0.5b", ("train.device=cpu", "data.seq_len=300"), 2),
    ],
)
def test_the_largest_that_fits_does_and_one_more_does_not(model: str, overrides: tuple[str, ...], gib: float) -> None:
    recipe, budget = recipe_for_model(model, ["train.device=cuda", *overrides]), int(gib * GIB)
    room = make_plan(recipe, budget_bytes=budget).room
    assert room is not None
    for key, most, step in (
        ("data.seq_len", room.seq_len, SEQ_LEN_STEP),
        ("train.micro_batch", room.micro_batch, 1),
    ):
        assert make_plan(changed(recipe, {key: most}), budget_bytes=budget).fits
        assert not make_plan(changed(recipe, {key: most + step}), budget_bytes=budget).fits
    assert room.seq_len % SEQ_LEN_STEP == 0


def test_what_does_not_fit_has_no_room() -> None:
    made = make_plan(recipe_for_model("llama-3.1-405b", ["train.device=cuda"]), budget_bytes=2 * GIB)
    assert made.room is None and made.to_json()["room"] is None


@pytest.mark.parametrize(("true", "expected"), [(1000, 1000), (1055, 1024), (5000, 4864), (10**9, 1 << 20)])
def test_the_largest_multiple_is_found_but_never_less_than_the_start(true: int, expected: int) -> None:
    assert largest(lambda n: n <= true, 1000, 256, 1 << 20) == expected


def test_there_is_an_end_to_the_search() -> None:
    assert largest(lambda n: True, 1, 1, MICRO_BATCH_LIMIT) == MICRO_BATCH_LIMIT
