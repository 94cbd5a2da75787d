"""The floor counts what a step cannot do without: never more than the step does, and nearly all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from qlora_kit.planning.operations import PARTS, Product, count_products
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config
from qlora_kit.planning.suggest import changed
from qlora_kit.recipe import Recipe
from qlora_kit.training.loop import train_step
from tools import floor
from tools.floor import floor_seconds, time_product
from tools.harness import write_recipe
from tools.kit_worker import build_run
from tools.random_base import random_base


class Operations(TorchDispatchMode):
    """Counts those of every product, by torch's formulas (its own `FlopCounterMode` fails within a recomputation)."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        in_place = {torch.ops.aten.addmm_: torch.ops.aten.addmm}
        formula = flop_registry.get(in_place.get(func._overloadpacket, func._overloadpacket))
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


@pytest.fixture
def case(tiny_shape: str, tmp_path: Path) -> tuple[ModelShapes, Recipe]:
    """Shapes of a small model on disk, and a recipe for 64 tokens of it."""
    model = random_base(tiny_shape, tmp_path)
    _, recipe, _ = write_recipe(tmp_path, model, {"data.seq_len": 64, "adapter.rank": 4})
    return model_shapes(*read_config(str(model))), recipe


def counted(shapes: ModelShapes, recipe: Recipe) -> float:
    """Operations of all products but attention's, which torch's counter does not know on a CPU."""
    work = count_products(shapes, recipe)
    del work["attention"]
    return sum(count * product.operations for products in work.values() for product, count in products.items())


@pytest.mark.parametrize(("recomputed", "at_most"), [(False, 1.05), (True, 1.15)])
def test_a_step_does_what_the_floor_counts_and_little_more(case, recomputed, at_most):
    shapes, recipe = case
    recipe = changed(recipe, {"memory.gradient_checkpointing": recomputed})
    run = build_run(recipe, steps=1)
    with Operations() as done:
        train_step(run)
    assert counted(shapes, recipe) <= done.total <= at_most * counted(shapes, recipe)


def test_a_timed_floor_has_all_its_parts_and_their_rates(case, monkeypatch):
    monkeypatch.setattr(floor, "REPEAT_SECONDS", 0.0)
    found = floor_seconds(*case)
    assert set(found.parts) == {*PARTS, "dequantization"} and min(found.parts.values()) > 0
    assert found.to_json()["seconds"] == pytest.approx(sum(found.parts.values()))


@pytest.mark.parametrize("form", ["NT", "NN", "TN"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_form_of_product_is_timed_in_its_own_shape(form, batch, monkeypatch):
    seen: list[torch.Size] = []
    matmul = torch.matmul
    monkeypatch.setattr(floor, "REPEAT_SECONDS", 0.0)
    monkeypatch.setattr(torch, "matmul", lambda a, b, out: seen.append((a.shape, b.shape)) or matmul(a, b, out=out))
    assert time_product(Product(form, 3, 5, 7, batch), torch.device("cpu"), torch.float32) > 0
    lead = (batch,) if batch > 1 else ()
    assert set(seen) == {((*lead, 3, 5), (*lead, 5, 7))}
