"""What each phase takes beside the highest moment: where the bytes go that leave the device."""

from __future__ import annotations

import pytest

from qlora_kit.planning.components import block_weights, pinned_blocks
from qlora_kit.planning.hardware import Device
from qlora_kit.planning.phases import Phase, phases
from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.recipe import recipe_for_model

GIB = 2**30
SHAPES = model_shapes(*read_config("llama-3-70b"))
CARD, CPU = Device("cuda", "card", 24 * GIB), Device("cpu", "cpu", 24 * GIB)
LINEARS = [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), (8192, 28672), (8192, 28672), (28672, 8192)]
STREAMED = ("memory.placement=disk", "memory.resident_blocks=10")


def planned(*overrides: str, device: Device = CARD) -> dict[str, Phase]:
    return phases(SHAPES, recipe_for_model("llama-3-70b", overrides), device)


def test_blocks_in_host_memory_take_little_more_than_their_bytes() -> None:
    recipe = recipe_for_model("llama-3-70b")
    in_use = 70 * block_weights(SHAPES, recipe)
    assert in_use < pinned_blocks(SHAPES, recipe, 70) < 1.1 * in_use  # one by one: 1.22


def test_blocks_from_files_pass_through_two_pinned_buffers() -> None:
    assert planned(*STREAMED, "memory.host_blocks=0")["train"].host_bytes == 2 * (512 << 20)
    assert planned(*STREAMED, "memory.host_blocks=70")["train"].host_bytes > 28 * GIB


def test_loading_holds_a_block_twice_while_it_is_packed() -> None:
    made, largest = planned("memory.placement=host"), 128256 * 8192 * 2
    twice = made["load"].host_bytes - made["train"].host_bytes - largest
    assert twice == block_weights(SHAPES, recipe_for_model("llama-3-70b"))


def test_offloaded_inputs_are_on_the_host_or_on_disk() -> None:
    inputs = 80 * 1024 * 8192 * 2
    on_host, on_disk = (planned(f"memory.activation_offload={tier}")["train"] for tier in ("host", "disk"))
    assert (on_host.host_bytes, on_host.disk_bytes) == (inputs, 0)
    assert (on_disk.host_bytes, on_disk.disk_bytes) == (1024 * 8192 * 2, inputs)


@pytest.mark.parametrize("phase", ["train", "eval"])
def test_beside_a_cpu_there_is_no_other_memory(phase: str) -> None:
    away = (*STREAMED, "memory.embeddings=disk", "memory.activation_offload=disk")
    assert planned(*away, device=CPU)[phase].host_bytes == 0
    assert planned(*away)[phase].host_bytes > 0


def test_merging_holds_the_adapter_and_tiles_and_beside_four_bits_one_linear() -> None:
    dense, packed = (planned(f"model.quantization={kind}")["merge"].host_bytes for kind in ("none", "nf4"))
    adapter = sum(16 * (i + o) for i, o in LINEARS) * 80 * 2
    assert dense == adapter + (80 << 20)
    assert packed - dense == 28672 * 8192 * (3 * 2 + 1)
