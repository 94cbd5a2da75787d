"""Stand-ins for blocks that are alike change nothing of what a simulated step takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.planning.hardware import CUDA_RUNTIME_BYTES, Device
from qlora_kit.planning.planner import plan_shapes
from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.profiling import simulate as simulation
from qlora_kit.profiling.simulate import simulate, unfilled_run
from qlora_kit.profiling.simulated_blocks import pass_alike_blocks
from qlora_kit.profiling.simulated_device import simulated_device
from qlora_kit.recipe import Recipe, recipe_for_model

LAYERS = 9
CONFIG = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": LAYERS, "vocab_size": 512}
CONFIG |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": False}
WAYS = {
    "plain": [],
    "several groups": ["train.grad_accumulation=6", "memory.micro_batches_together=3"],
    "all at once": ["train.grad_accumulation=3", "memory.micro_batches_together=3"],
    "large rank, so that gradients outgrow inputs": ["adapter.rank=128", "data.seq_len=128"],
    "some recomputed": ["memory.gradient_checkpointing=6"],
    "streamed": ["memory.placement=host", "memory.resident_blocks=5", "memory.activation_offload=host"],
    "from disk": ["memory.placement=disk", "memory.resident_blocks=3", "memory.host_blocks=4"],
    "kept dequantized": ["memory.keep_dequantized=true", "memory.mlp_tile_tokens=64"],
}


def recipe(folder: Path, model_type: str, overrides: list[str]) -> Recipe:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **CONFIG}))
    common = ["data.seq_len=256", "data.eval=held-out.jsonl", "memory.placement=device", "train.grad_accumulation=1"]
    common += ["memory.loss_chunk_tokens=64", "memory.gradient_checkpointing=true", "memory.activation_offload=false"]
    common += ["memory.keep_dequantized=false", "memory.embeddings=device", "memory.micro_batches_together=1"]
    return recipe_for_model(str(folder / "config.json"), [*common, *overrides])


def simulated(wanted: Recipe, memory_bytes: int = 1 << 30) -> dict[str, Any]:
    """All that is found but the series, in which the blocks that are passed are shorter."""
    device = Device("cuda", "a card", memory_bytes + CUDA_RUNTIME_BYTES)
    plan = plan_shapes(model_shapes(*read_config(wanted.model.path)), wanted, device)
    found = asdict(simulate(plan, wanted))
    return found | {"series": len(found["series"]["bytes"])}


@pytest.fixture(scope="module", autouse=True)
def tables(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Libraries make tables in the first step of a process and keep them."""
    simulated(recipe(tmp_path_factory.mktemp("first"), "llama", []))


QUICK = {("llama", "plain"), ("llama", "several groups"), ("gemma3_text", "plain")}
CASES = [*(("llama", way) for way in WAYS), ("gemma3_text", "plain"), ("qwen3", "all at once")]


@pytest.mark.parametrize(
    ("model_type", "way"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_step_takes_the_same_bytes_of_every_component_as_with_all_blocks(
    model_type: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(tmp_path, model_type, WAYS[way])
    passed = simulated(wanted)
    monkeypatch.setattr(simulation, "pass_alike_blocks", lambda base: 0)
    whole = simulated(wanted)
    assert passed.pop("series") < whole.pop("series")
    assert passed == whole and whole["refused"] is None


def test_a_device_that_lacks_one_allocation_runs_out_all_the_same(tmp_path: Path) -> None:
    wanted = recipe(tmp_path, "llama", [])
    needed = simulated(wanted)["phases"]["train"]
    assert simulated(wanted, needed)["refused"] is None
    assert simulated(wanted, needed - 512)["refused"] is not None


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ([], LAYERS - 4),
        (["memory.gradient_checkpointing=6"], 2),
        (["memory.gradient_checkpointing=false"], 0),
        (["adapter.target_modules=.*layers\\.[0-5]\\..*q_proj"], 0),  # trained tensors differ from block to block
    ],
)
def test_only_recomputed_blocks_that_train_alike_are_passed(overrides: list[str], count: int, tmp_path: Path) -> None:
    with simulated_device(None, shapes_only=True):
        more = [f"output={tmp_path / 'run'}", "train.optimizer=adamw_8bit"]
        run = unfilled_run(recipe(tmp_path, "llama", [*overrides, *more]))
        assert pass_alike_blocks(run.base) == count
