"""Profiles of whole runs on the simulated accelerator, whose own figures they are held to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_kit.errors import BudgetError
from qlora_kit.planning.calibration import calibrated
from qlora_kit.planning.components import COMPONENTS
from qlora_kit.planning.hardware import Device
from qlora_kit.planning.planner import Plan, make_plan, plan_shapes
from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.profiling.profiler import Profile, followed_step, profile
from qlora_kit.profiling.simulated_device import SimulatedDevice, simulated_device
from qlora_kit.recipe import Recipe, load_recipe
from qlora_kit.training.loop import train
from tests.test_cli import furnish


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Callable[..., Path]) -> Recipe:
    place = furnish(tmp_path, tiny_model("llama", torch.bfloat16))
    return load_recipe(place.recipe, ["train.device=auto", "train.optimizer=adamw_8bit", "train.grad_accumulation=2"])


def planned(recipe: Recipe) -> Plan:
    shapes = model_shapes(*read_config(recipe.model.path))
    return plan_shapes(shapes, recipe, Device("cuda", "a card", 1 << 30))


def profiled(recipe: Recipe, device: SimulatedDevice) -> Profile:
    plan = planned(recipe)
    found = profile(plan.placed(recipe), plan, steps=1)
    assert found.measured_bytes == device.peak_bytes
    return found


def test_the_measured_components_add_up_to_the_devices_own_peak(recipe: Recipe) -> None:
    with simulated_device() as device:
        found = profiled(recipe, device)
    assert (found.device, found.micro_batches, found.shape, found.process_bytes) == ("simgpu", 2, (1, 64), None)
    static = ("base_nf4", "quant_constants", "base_unquantized", "adapter", "optimizer")
    assert {name: found.measured[name] for name in static} == {name: found.planned[name] for name in static}
    assert 64 < found.tokens <= 128 and found.tokens_per_s == found.tokens / found.step_s > 0
    said = found.to_json()
    assert list(said["planned"]["components"]) == list(said["measured"]["components"]) == list(COMPONENTS)
    assert said["measured"]["peak_bytes"] == found.measured_bytes
    assert not Path(recipe.output).exists()


def test_running_out_says_what_held_the_memory_and_what_takes_less(recipe: Recipe) -> None:
    with simulated_device() as device:
        needed = profiled(recipe, device).measured_bytes
    with simulated_device(needed - 512), pytest.raises(BudgetError) as refused:
        profile(planned(recipe).placed(recipe), planned(recipe), steps=1)
    said = str(refused.value)
    assert "out of memory in step " in said and "held all through: base_nf4 " in said
    assert "less memory with: " in said


def test_a_run_whose_first_step_is_followed_is_the_same_run_and_has_every_component(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QLORA_KIT_NO_CALIBRATION")
    results = {}
    for name, first_step in (("plain", None), ("followed", followed_step)):
        asked = recipe.model_copy(update={"output": str(tmp_path / name)})
        asked = asked.model_copy(update={"train": asked.train.model_copy(update={"device": "cpu", "steps": 5})})
        plan = make_plan(asked, budget_bytes=1 << 30)
        train(plan.placed(asked), plan=plan.to_json(), first_step=first_step)
        results[name] = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
    assert results["plain"] == results["followed"]
    memory = json.loads((tmp_path / "followed" / "memory.json").read_text())
    measured = memory["measured"]
    assert measured["components"].keys() == set(COMPONENTS) == memory["planned"]["components"].keys()
    assert sum(measured["components"].values()) + measured["other_bytes"] == measured["peak_bytes"]
    assert measured["components"]["activations"] > 0 and measured["followed_step"] == 1
    assert memory["ratio"]["base_nf4"] == 1.0
    assert (tmp_path / "followed" / "report.html").is_file()
    assert calibrated("cpu").keys() == {"operations_s"}  # its heap kept what was freed
