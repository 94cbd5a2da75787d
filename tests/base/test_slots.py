"""Bytes arrive as they are and in time, from host memory and from files; none is lost, stale or raced for."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_kit.base.shards import Shards
from qlora_kit.base.slots import Slots, Source
from qlora_kit.errors import ModelError
from qlora_kit.profiling.simulated_device import simulated_device

COUNT, SIZE = 5, 1000


def expected(index: int) -> torch.Tensor:
    return torch.full((SIZE,), index + 1, dtype=torch.uint8)


def host_sources() -> dict[int, Source]:
    pinned = [torch.empty(SIZE, dtype=torch.uint8, pin_memory=True) for _ in range(COUNT)]
    return {index: Source(SIZE, host.copy_(expected(index))) for index, host in enumerate(pinned)}


def file_sources(folder: Path) -> tuple[dict[int, Source], Shards]:
    """Each source is two extents of a file."""
    save_file({f"{index}": expected(index) for index in range(COUNT)}, folder / "m.safetensors")
    shards = Shards([folder / "m.safetensors"])
    sources = {}
    for index in range(COUNT):
        entry = shards.entry(f"{index}")
        half = SIZE // 2
        first, second = (
            type(entry)(entry.path, entry.dtype, (half,), entry.offset + start, half) for start in (0, half)
        )
        sources[index] = Source(SIZE, extents=((0, first), (half, second)))
    return sources, shards


def walk(slots: Slots, order: list[int]) -> None:
    for index, following in zip(order, [*order[1:], None]):
        with slots.lent(index, following) as buffer:
            assert torch.equal(buffer[:SIZE].cpu(), expected(index))


ORDER = [0, 1, 2, 3, 4, 3, 2, 1, 0, 2, 2, 4]


@pytest.mark.parametrize("count", [2, 3])
def test_files_are_lent_in_any_order(count, tmp_path):
    sources, shards = file_sources(tmp_path)
    walk(Slots(sources, shards, torch.device("cpu"), count), ORDER)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("from_files", [True, False])
def test_copies_to_a_device_are_waited_for(from_files, count, tmp_path):
    with simulated_device() as device:
        sources, shards = file_sources(tmp_path) if from_files else (host_sources(), Shards([]))
        slots = Slots(sources, shards, torch.device("simgpu"), count)
        assert device.live_bytes == count * 1024 and sum(map(len, slots.buffers)) == count * SIZE
        walk(slots, ORDER)


def test_host_memory_is_used_in_place_on_a_cpu():
    sources = {0: Source(SIZE, expected(0))}
    slots = Slots(sources, Shards([]), torch.device("cpu"))
    with slots.lent(0) as buffer:
        assert buffer.data_ptr() == sources[0].host.data_ptr()
    assert slots.buffers == []


@pytest.mark.parametrize("from_files", [True, False])
def test_slots_let_go_with_a_copy_on_its_way_are_settled(from_files, tmp_path):
    with simulated_device():
        sources, shards = file_sources(tmp_path) if from_files else (host_sources(), Shards([]))
        slots = Slots(sources, shards, torch.device("simgpu"))
        with slots.lent(0, 1):
            pass
        slots.settle()  # without it, "allocated may take the place of freed"
        del slots
        torch.zeros(SIZE, dtype=torch.uint8, device="simgpu")


def test_what_cannot_be_read_is_raised_where_it_is_needed_and_tried_again(tmp_path):
    sources, shards = file_sources(tmp_path)
    slots = Slots(sources, shards, torch.device("cpu"))
    path = tmp_path / "m.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-SIZE])
    last = max(range(COUNT), key=lambda index: sources[index].extents[0][1].offset)
    with slots.lent((last + 1) % COUNT, last):
        time.sleep(0.05)
    with pytest.raises(ModelError, match="m.safetensors: ends at byte"), slots.lent(last):
        pass
    path.write_bytes(whole)
    walk(slots, [last])


def test_the_reader_ends_with_the_slots(tmp_path):
    before = set(threading.enumerate())
    sources, shards = file_sources(tmp_path)
    slots = Slots(sources, shards, torch.device("cpu"))
    walk(slots, [0, 1])
    (reader,) = set(threading.enumerate()) - before
    del slots
    reader.join(timeout=10)
    assert not reader.is_alive()


def test_one_slot_is_refused():
    with pytest.raises(ValueError, match="1 slots"):
        Slots({}, Shards([]), torch.device("cpu"), 1)
