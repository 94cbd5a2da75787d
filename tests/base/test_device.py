"""Memory figures are those of this process, on the device it uses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qlora_kit.base.device import free_bytes, peak_bytes, pick_device, reset_peak, resident_bytes
from qlora_kit.errors import RecipeError
from qlora_kit.profiling.simulated_device import simulated_device

CHILD = "import torch; from qlora_kit.base.device import peak_bytes; print(peak_bytes(torch.device('cpu')))"


def test_peak_of_a_child_does_not_count_what_its_parent_held():
    held = torch.ones(1 << 29, dtype=torch.uint8)  # 512 MiB, touched
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert int(child.stdout) < peak_bytes(torch.device("cpu")) - held.numel() // 2


def test_peak_is_at_least_what_is_resident():
    assert peak_bytes(torch.device("cpu")) >= resident_bytes() > 0


def test_an_accelerators_figures_are_its_own():
    with simulated_device(limit_bytes=1 << 20) as device:
        block = torch.empty(1 << 16, dtype=torch.uint8, device="simgpu")
        assert peak_bytes(block.device) == device.peak_bytes == 1 << 16
        assert free_bytes(block.device) == (1 << 20) - (1 << 16)
        del block
        reset_peak(torch.device("simgpu"))
        assert peak_bytes(torch.device("simgpu")) == 0


def test_a_device_that_is_not_there_is_refused_by_name():
    with pytest.raises(RecipeError, match="train.device: xpu is not available"):
        pick_device("xpu")


HEAP = """
import resource, torch
from qlora_kit.base import device
device.{choice}()
def touch():
    return [torch.ones(10 << 20, dtype=torch.uint8) for _ in range(8)]  # 80 MiB
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touch(), touch()  # side by side, so that the heap has room for either
print(device.resident_bytes() >> 20, min(faults() for _ in range(5)))  # the kernel may take idle pages in between
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_a_heap_that_keeps_freed_memory_faults_no_page_twice_and_one_that_returns_it_holds_none():
    def run(choice: str) -> list[int]:
        code = [sys.executable, "-c", HEAP.format(choice=choice)]
        return [int(value) for value in subprocess.run(code, capture_output=True, text=True, check=True).stdout.split()]

    returning, keeping = run("return_freed_memory"), run("keep_freed_memory")
    assert keeping[0] > returning[0] + 60
    assert keeping[1] < 16 <= returning[1]
