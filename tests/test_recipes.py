"""The prepared recipes keep their promise: planned, at full size on a simulated card, and with real numbers when small.

One set of tests for all of them: a new file in `recipes/` is tested by being there. A head that no longer is true is
written anew by `python -m tools.prove_recipes --write`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.planning.planner import make_plan
from qlora_kit.planning.shapes import read_config
from qlora_kit.prepared import CPU, Prepared, Promise, prepared_recipes
from qlora_kit.recipe import Recipe, load_recipe
from qlora_kit.training.loop import train
from tests.test_cli import write_tokenizer
from tools.prove_recipes import plan_prepared, promised, prove

RECIPES = prepared_recipes()
every_recipe = pytest.mark.parametrize("prepared", RECIPES.values(), ids=RECIPES.keys())

# Other cards of as many GB, the one with least memory first; the recipes name another of their class.
SAME_CLASS = {"8gb": ["rtx-3070"], "12gb": ["rtx-4070"], "16gb": ["rtx-5070-ti"], "24gb": ["l4", "a10g", "rtx-3090"]}
OTHER_CARDS = [
    (name, card) for name in RECIPES for size, cards in SAME_CLASS.items() if size in name.split("-") for card in cards
]
# Twins of one architecture are alike but for their recipes: the first of each always runs, the others with the slow.
FIRST_OF_KIND = {
    read_config(load_recipe(item.path).model.path)[0]["model_type"]: name
    for name, item in reversed(RECIPES.items())
    if name != "quickstart"
}
BLOCK_COUNTS = ("resident_blocks", "host_blocks", "gradient_checkpointing")  # a twin has two blocks: one of them
# One short example that a twin sees again and again, in each format.
EXAMPLES: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "2 + 2 ?"}, {"role": "assistant", "content": "it is 4 ."}]},
    "alpaca": {"instruction": "2 + 2 ?", "input": "", "output": "it is 4 ."},
    "completion": {"prompt": "2 + 2 ? ", "completion": "it is 4 ."},
    "text": {"text": "2 + 2 is 4 . 4 + 4 is 8 ."},
}


def test_there_are_recipes_for_cpus_small_cards_and_one_card_of_24_gb_up_to_72b():
    assert len(RECIPES) >= 20
    assert {CPU, "8gb", "12gb", "16gb", "24gb"} <= {word for name in RECIPES for word in name.split("-")}
    assert {"llama-2-70b-24gb", "llama-3.1-70b-24gb", "qwen2.5-72b-24gb"} <= RECIPES.keys()


@every_recipe
def test_a_recipe_is_planned_within_its_budget_and_its_head_says_what_it_takes(prepared: Prepared):
    recipe, plan = plan_prepared(prepared)
    assert plan.fits
    assert plan.device.kind == ("cpu" if prepared.promise.card == CPU else "cuda")
    assert plan.peak_phase == "train", "the step that is proved below is not the worst moment of the run"
    assert_true(prepared.promise, promised(prepared, plan))
    assert prepared.promise.budget_bytes == recipe.memory.budget


def assert_true(promise: Promise, now: Promise) -> None:
    """Every figure of the head is the planner's, within 3 % or what is lost by printing one decimal."""
    assert promise.card == now.card
    for name, said in vars(promise).items():
        if name == "card":
            continue
        unit = 1024 ** int(math.log(said, 1024))
        assert said == pytest.approx(vars(now)[name], rel=0.03, abs=0.06 * unit), f"{name}; now it is\n{now}"


@pytest.mark.parametrize(("name", "card"), OTHER_CARDS)
def test_a_recipe_fits_on_every_card_of_its_size(name: str, card: str, monkeypatch: pytest.MonkeyPatch):
    promise = RECIPES[name].promise
    monkeypatch.setattr("qlora_kit.planning.decide.host_memory_bytes", lambda: promise.host_free_bytes)
    assert make_plan(RECIPES[name].load(), gpu=card).fits


# ------------------------------------------------------------------------------------------------ at full size


@pytest.mark.slow
@every_recipe
def test_a_step_at_full_size_stays_within_the_budget_and_near_the_plan(prepared: Prepared, capsys):
    kept = prove(prepared)
    with capsys.disabled():
        print(f"\n{kept} {kept.ratio:.4f}")
    assert kept.measured_bytes <= kept.limit_bytes
    assert 0.97 <= kept.ratio <= 1.03
    assert kept.measured_host_bytes <= kept.planned_host_bytes <= 1.05 * kept.measured_host_bytes + (1 << 20)


# ------------------------------------------------------------------------------------------------ with real numbers


def twin(prepared: Prepared, model: Path, data: Path, output: Path) -> Recipe:
    """The recipe for a model of its architecture that is small in every way, and placed as the large one is."""
    changes = {
        "model.path": model,
        "data.train": data,
        "data.eval": data,
        "data.seq_len": 64,
        "train.steps": 4,
        "train.epochs": "null",
        "train.grad_accumulation": 2,
        "train.lr": 1e-2,
        "train.device": "cpu",
        "output": output,
    }
    recipe, plan = plan_prepared(prepared)
    small = load_recipe(prepared.path, [f"{key}={value}" for key, value in changes.items()])
    memory = plan.placed(recipe).memory.model_dump() | {"budget": "auto"}
    some = {key: 1 for key in BLOCK_COUNTS if type(memory[key]) is int and memory[key] > 0}
    return small.model_copy(update={"memory": small.memory.model_copy(update=memory | some)})


@pytest.mark.parametrize(
    "prepared",
    [
        pytest.param(item, id=name, marks=() if name in FIRST_OF_KIND.values() else pytest.mark.slow)
        for name, item in RECIPES.items()
    ],
)
def test_the_loss_of_a_shrunken_twin_falls(prepared: Prepared, tiny_model: Callable[..., Path], tmp_path: Path):
    recipe, _ = plan_prepared(prepared)
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(read_config(recipe.model.path)[0]["model_type"]), folder)
    write_tokenizer(folder)
    data = tmp_path / "train.jsonl"
    data.write_text(f"{json.dumps(EXAMPLES[recipe.data.format])}\n" * 16)
    result = train(twin(prepared, folder, data, tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert result.last_evaluation.loss < result.first_evaluation.loss


def test_twins_of_large_models_stream_their_blocks(tmp_path: Path):
    small = twin(RECIPES["llama-3.1-70b-24gb"], tmp_path / "model", tmp_path / "data", tmp_path / "run")
    assert (small.memory.placement, small.memory.resident_blocks, small.memory.embeddings) == ("host", 1, "host")
