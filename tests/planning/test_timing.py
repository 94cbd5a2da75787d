"""Estimated times: what they are made of, which cards they are known for, and which way they move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.planning import timing
from qlora_kit.planning.calibration import calibration_file
from qlora_kit.planning.decide import decided
from qlora_kit.planning.gpus import CARDS
from qlora_kit.planning.hardware import GIB, Device, find_gpu
from qlora_kit.planning.planner import make_plan
from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.planning.timing import Estimate, card_of, estimate
from qlora_kit.recipe import recipe_for_model


@pytest.fixture(autouse=True)
def nothing_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QLORA_KIT_NO_CALIBRATION")


def time(model: str, *overrides: str, device: Device | None = None) -> Estimate:
    device = device or find_gpu("rtx-4090")
    shapes = model_shapes(*read_config(model))
    found = estimate(shapes, decided(shapes, recipe_for_model(model, overrides), device), device)
    assert found is not None
    return found


def test_a_step_of_an_8b_model_is_a_little_slower_than_its_operations_alone() -> None:
    step = time("llama-3.1-8b", "data.seq_len=2048", "train.grad_accumulation=4", "train.micro_batch=2")
    tokens = 4 * 2 * 2048
    least = tokens * 3 * 2 * 7.0e9 / (timing.PRODUCT_SHARE * CARDS["rtx-4090"].teraflops * 1e12)
    assert least < step.compute_s < 1.5 * least
    assert (step.transfer_s, step.bound_by, step.step_s) == (0.0, "compute", step.compute_s)


def test_more_accumulation_takes_as_much_longer_and_steps_make_the_run() -> None:
    one = time("llama-3.1-8b", "train.grad_accumulation=2", "memory.micro_batches_together=1")
    two = time("llama-3.1-8b", "train.grad_accumulation=4", "memory.micro_batches_together=1", "train.steps=10")
    assert two.step_s == pytest.approx(2 * one.step_s)
    assert two.run_s == pytest.approx(20 * one.step_s)
    assert one.run_s is None


@pytest.mark.parametrize(
    ("faster", "slower"),
    [
        ("memory.gradient_checkpointing=false", "memory.gradient_checkpointing=true"),
        ("memory.keep_dequantized=true", "memory.keep_dequantized=false"),
        ("memory.micro_batches_together=8", "memory.micro_batches_together=1"),
        ("data.seq_len=512", "data.seq_len=1024"),
        ("adapter.rank=8", "adapter.rank=256"),
    ],
)
def test_what_spares_work_spares_time(faster: str, slower: str) -> None:
    roomy = find_gpu("h200")
    assert time("llama-3.1-8b", faster, device=roomy).step_s < time("llama-3.1-8b", slower, device=roomy).step_s


def test_streamed_blocks_arrive_twice_a_group_but_the_last_and_from_a_disk_slowly() -> None:
    streamed = ("memory.resident_blocks=0", "memory.host_blocks=0", "train.grad_accumulation=4")
    shared = time("llama-2-7b", *streamed, "memory.placement=host", "memory.micro_batches_together=4")
    alone = time("llama-2-7b", *streamed, "memory.placement=host", "memory.micro_batches_together=1")
    disk = time("llama-2-7b", *streamed, "memory.placement=disk", "memory.micro_batches_together=4")
    weights = 32 * model_shapes(*read_config("llama-2-7b")).block_linear_parameters
    bytes_moved = (2 * 32 - 2) / 32 * weights * 0.516
    lanes = timing.PCIE_SHARE * 16 * timing.PCIE_LANE_BYTES_S[4]
    assert shared.transfer_s == pytest.approx(bytes_moved / lanes, rel=0.01)
    assert alone.transfer_s == pytest.approx(4 * shared.transfer_s)
    assert disk.transfer_s == pytest.approx(bytes_moved / timing.DISK_BYTES_S, rel=0.01)


def test_a_short_step_from_disk_is_bound_by_transfers() -> None:
    short = ("memory.placement=disk", "data.seq_len=64", "train.grad_accumulation=1", "memory.host_blocks=0")
    assert time("llama-3.1-70b", *short).bound_by == "transfer"


def test_a_small_model_cannot_be_faster_than_its_launches() -> None:
    assert time("smollm2-135m", "data.seq_len=16", "train.grad_accumulation=1").step_s >= 30 * timing.LAUNCH_S


# ------------------------------------------------------------------------------------------------ whose rates


@pytest.mark.parametrize(
    ("driver", "gib", "key"),
    [
        ("NVIDIA GeForce RTX 4090", 23.99, "rtx-4090"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.99, "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 8.0, "rtx-4060-ti-8gb"),
        ("NVIDIA GeForce RTX 4070 SUPER", 11.99, "rtx-4070-super"),
        ("NVIDIA RTX 6000 Ada Generation", 47.99, "rtx-6000-ada"),
        ("NVIDIA A100-SXM4-80GB", 80.0, "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", 79.6, "h100"),
        ("NVIDIA H100 PCIe", 79.6, "h100-pcie"),
        ("Tesla V100-SXM2-32GB", 32.0, "v100-32gb"),
        ("NVIDIA GeForce RTX 2070 SUPER", 8.0, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.99, None),
        ("NVIDIA Something New", 24.0, None),
    ],
)
def test_a_card_that_the_driver_names_is_found_in_the_catalogue(driver: str, gib: float, key: str | None) -> None:
    assert card_of(Device("cuda", driver, int(gib * GIB))) == (key and CARDS[key])


def test_a_budget_changes_no_rate() -> None:
    assert card_of(Device("cuda", "NVIDIA GeForce RTX 4090", 8 * GIB, 16 * GIB)) == CARDS["rtx-4090"]


def test_without_rates_there_is_no_estimate() -> None:
    for gpu, dtype in (("t4", "bfloat16"), ("rtx-4090", "float32")):
        made = make_plan(recipe_for_model("smollm2-135m", [f"model.dtype={dtype}"]), gpu=gpu)
        assert made.estimated is None and made.to_json()["estimated"] is None
    assert make_plan(recipe_for_model("smollm2-135m", ["model.dtype=float16"]), gpu="t4").estimated is not None
    assert make_plan(recipe_for_model("smollm2-135m", ["train.device=cpu"]), budget_bytes=GIB).estimated is None


RATES = {"products_s": 4e11, "attention_s": 2e11, "memory_bytes_s": 2e10}
RATES |= {"dequantized_weights_s": 1e9, "host_bytes_s": 1e10, "disk_bytes_s": 1e9}


@pytest.mark.parametrize(
    ("content", "known"),
    [
        ({"cpu": RATES}, True),
        ({"other": RATES}, False),
        ({"cpu": RATES | {"disk_bytes_s": 0}}, False),
        ({"cpu": {"products_s": 1}}, False),
        ([], False),
    ],
)
def test_measured_rates_go_before_all_others(content: Any, known: bool) -> None:
    calibration_file().parent.mkdir()
    calibration_file().write_text(json.dumps(content))
    made = make_plan(recipe_for_model("smollm2-135m", ["train.device=cpu"]), budget_bytes=GIB)
    assert (made.estimated is not None) == known
