"""Running out of memory: at once if at all, and, where the recipe says so, no step is lost by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_kit.errors import BudgetError
from qlora_kit.planning.planner import changes_that_fit, make_plan
from qlora_kit.planning.suggest import changed
from qlora_kit.profiling.simulated_device import simulated_device
from qlora_kit.recipe import Recipe, load_recipe, recipe_for_model
from qlora_kit.recipe_yaml import read_value
from qlora_kit.training import loop
from qlora_kit.training.loop import train, train_step
from qlora_kit.training.run import Run, prepare
from qlora_kit.training.signals import StopRequest
from qlora_kit.training.smaller import repeat_smaller
from tests.test_cli import furnish

KEYS = ["train.optimizer=adamw_8bit", "adapter.dropout=0.1", "data.packing=false", "train.save_every=1"]
KEYS += ["memory.on_oom=split", "memory.activation_offload=host"]
FOUR, TWO = [("train.micro_batch=4", "train.grad_accumulation=1"), ("train.micro_batch=2", "train.grad_accumulation=2")]
GPU = "train.device=auto"


@pytest.fixture
def load(tmp_path: Path, tiny_model: Callable[..., Path]) -> Callable[..., Recipe]:
    """`load("name", "train.micro_batch=2")` -> the recipe of a run in the folder `name`."""
    place = furnish(tmp_path, tiny_model("llama", torch.bfloat16))
    return lambda name, *keys: load_recipe(place.recipe, [*KEYS, *keys, f"output={tmp_path / name}"])


def lines(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]


def losses(recipe: Recipe) -> list[float]:
    return [line.get("loss", line.get("eval_loss")) for line in lines(recipe)]


def adapter(recipe: Recipe) -> bytes:
    return (Path(recipe.output) / "adapter" / "adapter_model.safetensors").read_bytes()


def rows_of_steps(recipe: Recipe) -> list[int | None]:
    return [line.get("micro_batch") for line in lines(recipe) if "loss" in line]


# ------------------------------------------------------------------------------------------------ split


def test_a_run_that_fits_with_two_rows_at_a_time_is_split_and_is_the_run_with_two_bit_for_bit(
    load: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    two, four = load("two", *TWO, GPU), load("four", *FOUR, GPU)
    with simulated_device():
        needed = train(two).peak_bytes
    with simulated_device(needed):
        train(four)
    assert losses(four) == losses(two) and len(losses(four)) == 5  # 3 steps, 2 evaluations
    assert adapter(four) == adapter(two)
    assert rows_of_steps(four) == [2, 2, 2]
    assert capsys.readouterr().err.count("from now on, in micro-batches of 2 row(s), one by one") == 1


def test_memory_that_gets_short_in_a_run_costs_no_step_and_a_resumed_run_goes_on_split(
    load: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = load("whole", *FOUR, GPU), load("parts", *FOUR, GPU)
    real, stop_after = loop.train_step, 9
    with simulated_device() as device:

        def tighter(run: Run) -> dict[str, Any]:
            if run.progress.step == stop_after:
                raise KeyboardInterrupt
            device.reset_peak()
            line = real(run)
            if run.progress.step == 1:
                device.limit_bytes = device.peak_bytes - 4096
            return line

        monkeypatch.setattr(loop, "train_step", tighter)
        train(whole)
        device.limit_bytes, stop_after = None, 2
        with pytest.raises(KeyboardInterrupt):
            train(parts)
        device.limit_bytes, stop_after = None, 9
        train(parts, resume=True)
    assert rows_of_steps(whole) == rows_of_steps(parts) == [None, 2, 2]
    assert losses(parts) == losses(whole)
    assert adapter(parts) == adapter(whole)


def test_micro_batches_that_pass_together_pass_one_by_one_first_which_changes_no_bit(
    load: Callable[..., Recipe],
) -> None:
    apart, together = load("apart", *TWO, GPU), load("together", *TWO, GPU, "memory.micro_batches_together=2")
    with simulated_device():
        needed = train(apart).peak_bytes
    with simulated_device(needed):
        train(together)
    assert rows_of_steps(together) == [2, 2, 2]
    assert losses(together) == losses(apart) and adapter(together) == adapter(apart)


def test_what_a_cpu_says_of_its_memory_is_understood_and_splits_too(
    load: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.batch_losses

    def greedy(base: Any, batches: Any, *others: Any) -> Any:
        if len(batches[0].documents) > 2:
            torch.empty(1 << 60, dtype=torch.uint8)  # more than any system grants
        return real(base, batches, *others)

    two, four = load("two", *TWO), load("four", *FOUR)
    train(two)
    monkeypatch.setattr(loop, "batch_losses", greedy)
    train(four)
    assert rows_of_steps(four) == [2, 2, 2]
    assert losses(four) == losses(two) and adapter(four) == adapter(two)


def test_an_optimizers_step_is_not_repeated_and_other_errors_are_not_taken_for_memory(
    load: Callable[..., Recipe],
) -> None:
    calls = []

    def fails(problem: RuntimeError) -> Callable[[], None]:
        def step() -> None:
            calls.append(problem)
            raise problem

        return step

    run = prepare(load("run", *FOUR), StopRequest())
    for problem in (torch.OutOfMemoryError("full"), RuntimeError("shapes differ")):
        run.optimizer.step = fails(problem)  # type: ignore[method-assign]
        with pytest.raises(type(problem), match=str(problem)):
            train_step(run)
    assert len(calls) == 2 and run.progress.rows is None
    with pytest.raises(RuntimeError, match="shapes differ"):
        repeat_smaller(run, fails(RuntimeError("shapes differ")))


# ------------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize("on_oom", ["fail", "split"])
def test_what_cannot_be_split_ends_before_the_first_step_and_says_which_changes_fit(
    on_oom: str, load: Callable[..., Recipe]
) -> None:
    recipe = load("run", *TWO, GPU, f"memory.on_oom={on_oom}", "memory.activation_offload=false")
    with simulated_device() as device:
        _run, held_bytes = prepare(recipe, StopRequest()), device.live_bytes
    with simulated_device(held_bytes + 4096), pytest.raises(BudgetError) as refused:
        train(recipe)
    said = str(refused.value)
    assert said.startswith("out of memory in step 1: simgpu out of memory: asked for ")
    assert "less memory with: " in said and "=auto" not in said
    assert ("train.micro_batch" in said) == (on_oom == "fail")
    assert not (Path(recipe.output) / "metrics.jsonl").exists()  # so it may simply be started again


def test_the_changes_of_a_run_are_values_that_are_planned_to_fit() -> None:
    asked = recipe_for_model("llama-2-7b", ["train.device=cuda", "data.seq_len=2048", "train.micro_batch=4"])
    made = make_plan(asked, budget_bytes=16 << 30)
    limit = int(0.9 * made.peak_bytes)
    placed = made.placed(asked)
    found = changes_that_fit(placed, limit)
    for line in found:
        options = [word for word in line.partition("   ")[0].split() if word != "--set"]
        keys = {key: read_value(value) for key, _, value in (option.partition("=") for option in options)}
        assert "auto" not in keys.values()
        assert make_plan(changed(placed, keys), budget_bytes=limit).fits
    assert {line.split()[1].partition("=")[0] for line in found} >= {"train.micro_batch", "data.seq_len"}
    assert any("memory." in line for line in found)


# ------------------------------------------------------------------------------------------------ longest rows first


@pytest.mark.parametrize("grad_accumulation", [1, 2])
def test_the_rehearsal_changes_no_bit(
    grad_accumulation: int, load: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    key = f"train.grad_accumulation={grad_accumulation}"
    first, without = load("first", key), load("without", key)
    train(first)
    assert capsys.readouterr().err.count("first the longest rows, to see that they fit") == 1
    monkeypatch.setattr(loop, "rehearse", lambda run: None)
    train(without)
    assert losses(first) == losses(without) and adapter(first) == adapter(without)


def test_there_is_none_where_step_1_comes_at_once_with_rows_as_long_nor_in_a_resumed_run(
    load: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    train(load("packed", "data.packing=true", "data.eval=null"))
    train(load("evaluated"))
    assert capsys.readouterr().err.count("first the longest rows") == 1
    train(load("evaluated"), resume=True)
    assert "first the longest rows" not in capsys.readouterr().err
