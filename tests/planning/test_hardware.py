"""Devices: the catalogue, the machine's own, and the user's limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.errors import RecipeError
from qlora_kit.planning import hardware
from qlora_kit.planning.gpus import CARDS
from qlora_kit.planning.hardware import GIB, Device, device_for, find_gpu


@pytest.fixture(autouse=True)
def no_card_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "detect_gpu", lambda: None)


@pytest.mark.parametrize("name", ["rtx-4090", "RTX 4090", "NVIDIA GeForce RTX 4090", "4090"])
def test_a_card_is_found_however_it_is_written(name: str) -> None:
    assert find_gpu(name) == Device("cuda", "rtx-4090", CARDS["rtx-4090"].memory_bytes)


def test_a_card_has_less_than_the_number_on_its_box() -> None:
    boxes = {"rtx-3060-12gb": 12, "rtx-3090": 24, "rtx-4090": 24, "rtx-5090": 32, "a100-40gb": 40, "h100": 80, "t4": 16}
    assert all(0.9 * size * GIB < CARDS[name].memory_bytes < size * GIB for name, size in boxes.items())


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("rtx-4091", "did you mean 'rtx-4090'"),
        ("a100", "which one, a100-40gb or a100-80gb"),
        ("V100", "which one, v100-16gb or v100-32gb"),
        ("abacus", "unknown card; known: .*rtx-3090.*or give --budget"),
    ],
)
def test_an_unknown_card_is_an_error_with_the_nearest(name: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        find_gpu(name)


def test_auto_is_the_named_card_else_the_one_here_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Device("cuda", "here", 7)
    monkeypatch.setattr(hardware, "host_memory_bytes", lambda: 100)
    assert device_for("auto") == Device("cpu", "cpu", 100)
    monkeypatch.setattr(hardware, "detect_gpu", lambda: here)
    assert device_for("auto") == here
    assert device_for("auto", gpu="t4").name == "t4"
    assert device_for("cpu").kind == "cpu"


def test_of_a_card_and_a_budget_the_smaller_counts() -> None:
    assert device_for("auto", "rtx-4090", 8 * GIB).memory_bytes == 8 * GIB
    assert device_for("auto", "rtx-4090", 80 * GIB).memory_bytes == CARDS["rtx-4090"].memory_bytes


def test_a_budget_stands_in_for_a_device_that_is_not_here() -> None:
    assert device_for("cuda", budget_bytes=8 * GIB) == Device("cuda", "cuda", 8 * GIB)
    assert device_for("auto", budget_bytes=8 * GIB) == Device("cpu", "cpu", 8 * GIB)
    with pytest.raises(RecipeError, match="train.device=cuda: no such device is seen here"):
        device_for("cuda")


def test_a_card_for_a_run_on_the_cpu_is_refused() -> None:
    with pytest.raises(RecipeError, match="--gpu t4: the recipe runs on train.device=cpu"):
        device_for("cpu", gpu="t4")


def test_the_runtime_is_a_constant_of_the_kind_of_device_or_what_was_measured() -> None:
    found = [Device(kind, "x", 1).runtime_bytes for kind in ("cuda", "cpu", "mps")]
    assert found == [hardware.CUDA_RUNTIME_BYTES, hardware.CPU_RUNTIME_BYTES, 0]
    assert Device("cuda", "x", 1, measured_bytes=7).runtime_bytes == 7


def test_host_memory_is_positive_and_respects_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"memory.max": "1000", "memory.current": "700", "memory.stat": "inactive_file 50\n"}.items():
        (tmp_path / name).write_text(text)
    assert hardware._cgroup_free_bytes(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max")
    assert hardware._cgroup_free_bytes(tmp_path) is None
    monkeypatch.setattr(hardware, "_cgroup_free_bytes", lambda: 350)
    assert hardware.host_memory_bytes() == 350


def test_a_control_group_of_version_1_is_respected_too(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("8:pids:/\n4:memory:/a/b\n0::/\n")
    group = tmp_path / "memory" / "a" / "b"
    group.mkdir(parents=True)
    values = {
        "memory.limit_in_bytes": "1000",
        "memory.usage_in_bytes": "700",
        "memory.stat": "total_inactive_file 50\n",
    }
    for name, text in values.items():
        (group / name).write_text(text)
    assert hardware._cgroup_free_bytes(tmp_path, own) == 350


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo '24564, NVIDIA GeForce RTX 4090'", Device("cuda", "NVIDIA GeForce RTX 4090", 24564 * 2**20)),
        ("echo 'No devices were found'", None),
        ("exit 9", None),
    ],
)
def test_the_driver_is_asked_for_the_card_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, expected: Device | None
) -> None:
    monkeypatch.undo()
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{answer}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.detect_gpu() == expected
