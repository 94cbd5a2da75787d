"""The tracker's figures: the simulated accelerator's own total at every mark, the plan's static bytes, nobody's few."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import load_base
from qlora_kit.base.owners import hand_over, listening, mark, owner
from qlora_kit.data.tokenize import Example
from qlora_kit.planning.comparison import OTHER
from qlora_kit.planning.components import COMPONENTS
from qlora_kit.planning.moments import static_ledger, total, training_moments
from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.profiling.simulate import unfilled_run
from qlora_kit.profiling.simulated_device import SimulatedDevice, simulated_device
from qlora_kit.profiling.tracker import Tracker
from qlora_kit.recipe import Recipe, recipe_for_model
from qlora_kit.training.loop import train_step
from qlora_kit.training.memory import static_bytes, static_tensors
from qlora_kit.training.run import assemble
from qlora_kit.training.signals import StopRequest
from tests.conftest import CONFIGS, SPECIAL

CPU = torch.device("cpu")
WIDE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "vocab_size": 2048}
STEP = ("data.seq_len=256", "train.grad_accumulation=2", "train.optimizer=adamw_8bit", "adapter.rank=8")
SWITCHES: list[tuple[str, ...]] = [
    ("memory.gradient_checkpointing=false",),
    ("memory.gradient_checkpointing=1", "memory.micro_batches_together=2"),
    ("memory.placement=host", "memory.resident_blocks=1", "memory.activation_offload=host"),
    ("memory.placement=disk", "memory.embeddings=disk", "memory.keep_dequantized=true"),
    ("memory.embeddings=host", "memory.mlp_tile_tokens=64", "train.optimizer=adamw", "train.master_weights=false"),
    ("model.quantization=none", "memory.activation_offload=disk", "adapter.dropout=0.1"),
]


class Compared(Tracker):
    """Holds its total to the device's at every mark."""

    def __init__(self, device: SimulatedDevice, *args: Any) -> None:
        super().__init__(torch.device("simgpu"), *args)
        self.simulated, self.parts = device, list[str]()

    def mark(self, part: str, block: int | None) -> None:
        super().mark(part, block)
        assert self.total_bytes == self.simulated.live_bytes, f"{part} {block}"
        self.parts.append(part)


def recipe_of(model_type: str, folder: Path, *overrides: str) -> Recipe:
    """A model of some breadth, so that what is a few bytes is seen to be few."""
    wide = WIDE if "hidden_size" in CONFIGS[model_type] else {"n_embd": 256, "n_layer": 3, "vocab_size": 2048}
    config = {"model_type": model_type, **CONFIGS[model_type], **SPECIAL, **wide}
    (folder / "config.json").write_text(json.dumps(config))
    return recipe_for_model(str(folder / "config.json"), [*STEP, f"output={folder / 'run'}", *overrides])


def followed_step(recipe: Recipe) -> Compared:
    """One step on the simulated device; its static components are those of the plan, and of a walk over the run."""
    with simulated_device(shapes_only=True) as device:
        run = unfilled_run(recipe)
        train_step(run)
        static = static_bytes(run)
        device.reset_peak()
        tracker = Compared(device, static_tensors(run))
        with tracker:
            train_step(run)
        assert tracker.total_bytes == device.live_bytes
        assert tracker.peak_bytes == sum(tracker.peak.values()) == device.peak_bytes
        planned = static_ledger(model_shapes(*read_config(recipe.model.path)), recipe, 0)
        for name in ("base_nf4", "quant_constants", "base_unquantized", "adapter", "optimizer"):
            assert tracker.peak[name] == planned[name] == static[name], name
        return tracker


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_byte_of_a_step_has_its_component_in_each_architecture(model_type: str, tmp_path: Path) -> None:
    tracker = followed_step(recipe_of(model_type, tmp_path))
    assert tracker.peak[OTHER] < 0.02 * tracker.peak_bytes
    parts = ["embedding", *["forward"] * 3, "final norm", "loss", "head backward", *["backward"] * 3]
    assert tracker.parts == [*parts, *parts, "optimizer"]


@pytest.mark.parametrize("changes", SWITCHES, ids=" ".join)
def test_every_byte_of_a_step_has_its_component_under_each_switch(changes: tuple[str, ...], tmp_path: Path) -> None:
    recipe = recipe_of("llama", tmp_path, *changes)
    tracker = followed_step(recipe)
    assert tracker.peak[OTHER] < 0.02 * tracker.peak_bytes
    moments = training_moments(model_shapes(*read_config(recipe.model.path)), recipe, 0)
    planned = max(moments.values(), key=total)
    for name in ("gradients", "logits", "workspace"):
        largest = max(values[list(tracker.live).index(name)] for values in tracker.series.bytes)
        assert abs(largest - max(ledger[name] for ledger in moments.values())) <= 0.02 * total(planned), name


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_step_on_the_cpu_has_its_components_and_not_one_bit_changed(
    model_type: str, tiny_model: Any, tmp_path: Path
) -> None:
    model, trained = tiny_model(model_type, torch.bfloat16), []
    recipe = recipe_for_model(str(model), [*STEP, "data.seq_len=64", f"output={tmp_path / 'run'}"])
    rows = [Example([*range(3, 60)], [*range(4, 61)], "")] * 2
    for follows in (False, True):
        run = assemble(recipe, load_base(recipe.model), rows, [], StopRequest())
        losses = [train_step(run)["loss"]]
        tracker = Tracker(CPU, static_tensors(run))
        with tracker if follows else contextlib.nullcontext():
            losses.append(train_step(run)["loss"])
        trained.append([*losses, *(parameter.clone() for parameter in run.parameters.values())])
    assert all(torch.equal(torch.as_tensor(one), torch.as_tensor(other)) for one, other in zip(*trained, strict=True))
    assert trained[0][0] != trained[0][1]
    planned = static_ledger(model_shapes(*read_config(recipe.model.path)), recipe, 0)
    for name in ("base_nf4", "quant_constants", "base_unquantized", "adapter", "optimizer", "gradients"):
        assert tracker.peak[name] == planned[name], name
    assert all(tracker.peak[name] > 0 for name in ("activations", "workspace"))
    gone = ("gradients", "activations", "logits", "runtime")
    assert [tracker.live[name] for name in gone] == [0] * len(gone)


# ---------------------------------------------------------------------------------------------------- by hand


def test_views_share_their_storage_and_in_place_operators_make_none() -> None:
    with Tracker(CPU) as tracker:
        made = torch.zeros(256)
        kept = made[:8].view(2, 4)
        made.add_(1).mul_(2)
        torch.add(made, 1, out=made)
        assert tracker.total_bytes == 1024
        del made
        assert tracker.total_bytes == 1024
        del kept
        assert tracker.total_bytes == 0
    assert tracker.peak_bytes == 1024


def test_what_only_the_graph_holds_is_alive() -> None:
    weight = torch.ones(256, requires_grad=True)
    with Tracker(CPU, [("adapter", weight)]) as tracker:
        loss = (weight * 2).exp().sum()  # exp keeps its result for its backward, nobody else does
        assert tracker.live == dict.fromkeys(tracker.live, 0) | {"adapter": 1024, "activations": 1024 + 4}
        loss.backward()
        del loss
        hand_over("gradients", [weight.grad])
        assert tracker.live["gradients"] == 1024
        weight.grad = None
        assert tracker.total_bytes == 1024


def test_a_tag_holds_in_the_backward_that_it_surrounds() -> None:
    weight = torch.ones(256, requires_grad=True)
    with Tracker(CPU) as tracker:
        with owner("logits"):
            (weight * 2).sum().backward()
        assert (tracker.live["logits"], tracker.live[OTHER]) == (1024, 1024)


def test_a_storage_that_grows_or_dies_in_another_thread_is_counted() -> None:
    with Tracker(CPU) as tracker:
        made = [torch.zeros(8)]
        made[0].resize_(64)
        assert tracker.total_bytes == 256
        thread = threading.Thread(target=made.clear)
        thread.start()
        thread.join()
        assert tracker.total_bytes == 0


def test_the_series_keeps_the_highest_point_and_its_part() -> None:
    with Tracker(CPU) as tracker:
        mark("forward", 0)
        kept = torch.zeros(256)
        mark("backward", 0)
        (kept + 1).sum()
        mark("optimizer")
    assert str(tracker.peak_place) == "backward of block 0"
    assert max(map(sum, tracker.series.bytes)) == tracker.peak_bytes == sum(tracker.peak.values())
    assert [str(place) for _, place in tracker.series.marks] == [
        "forward of block 0",
        "backward of block 0",
        "optimizer",
    ]


def test_one_tracker_at_a_time_and_silence_without_one() -> None:
    mark("nobody listens")
    hand_over("gradients", [torch.ones(1)])
    with Tracker(CPU), pytest.raises(RuntimeError, match="already"), listening(Tracker(CPU)):
        pass
    with Tracker(CPU) as tracker:
        pass
    assert tracker.series.marks == []
    assert tuple(tracker.live) == (*COMPONENTS, OTHER)
