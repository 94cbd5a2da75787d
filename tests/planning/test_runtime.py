"""What a process takes beside tensors: a constant, and holes of the heap where there is room for them."""

from __future__ import annotations

from qlora_kit.planning.hardware import CPU_RUNTIME_BYTES, CUDA_RUNTIME_BYTES, Device
from qlora_kit.planning.moments import total, training_moments
from qlora_kit.planning.runtime import ROOMY_SHARE, WIDTH_BYTES, is_constant, is_roomy, runtime_bytes
from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.recipe import Recipe, recipe_for_model

SHAPES = model_shapes(*read_config("llama-3.2-1b"))


def recipe(*overrides: str) -> Recipe:
    placed = ("memory.placement=device", "memory.gradient_checkpointing=true", "memory.keep_dequantized=false")
    return recipe_for_model("llama-3.2-1b", ["memory.micro_batches_together=1", *placed, *overrides])


def test_a_cpu_with_room_has_holes_and_a_tight_one_has_none() -> None:
    moments = training_moments(SHAPES, recipe(), CPU_RUNTIME_BYTES)
    highest = max(map(total, moments.values()))
    tight, roomy = (runtime_bytes(SHAPES, recipe(), Device("cpu", "cpu", size)) for size in (highest, 4 * highest))
    assert tight == CPU_RUNTIME_BYTES
    assert CPU_RUNTIME_BYTES + 20 * 2**20 < roomy < CPU_RUNTIME_BYTES + highest
    assert [is_constant({"runtime": runtime}) for runtime in (tight, roomy)] == [True, False]
    devices = [Device(kind, kind, size) for kind in ("cpu", "cuda") for size in (highest, 4 * highest)]
    assert [is_roomy(SHAPES, recipe(), device) for device in devices] == [False, True, False, True]


def test_rows_of_many_widths_take_kernels_for_each() -> None:
    sizes = [
        runtime_bytes(SHAPES, recipe("data.seq_len=512", f"data.packing={packing}"), Device("cpu", "cpu", 1 << 30))
        for packing in ("true", "false")
    ]
    assert sizes == [CPU_RUNTIME_BYTES, CPU_RUNTIME_BYTES + 11 * WIDTH_BYTES]


def test_with_the_holes_a_roomy_plan_stays_below_its_share_of_the_budget() -> None:
    highest = max(map(total, training_moments(SHAPES, recipe(), 0).values()))
    for percent in range(100, 300, 10):
        budget = highest * percent // 100
        runtime = runtime_bytes(SHAPES, recipe(), Device("cpu", "cpu", budget))
        assert runtime == CPU_RUNTIME_BYTES or highest + runtime <= ROOMY_SHARE * budget


def test_on_a_card_it_is_the_context() -> None:
    assert runtime_bytes(SHAPES, recipe(), Device("cuda", "x", 1 << 40)) == CUDA_RUNTIME_BYTES
