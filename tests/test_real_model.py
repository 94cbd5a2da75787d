"""The quickstart's real model: a run that was stopped, or whose blocks live on disk, ends with the same adapter.

Model and data are those of `make quickstart`, in its folders; they are prepared if they are not there.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tools.quickstart.__main__ import CACHE, DATA, MODEL, RECIPE
from tools.quickstart.data import prepare_data
from tools.quickstart.model import prepare_model

ROOT = Path(__file__).parents[1]
SHORT = ("train.steps=4", "train.save_every=1", "data.eval=null", "adapter.dropout=0.1")
Train = Callable[..., list[str]]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`train(output, override...)` -> the command of four steps of the quickstart's recipe."""
    prepare_model(ROOT / MODEL, ROOT / CACHE)
    prepare_data(ROOT / DATA, ROOT / CACHE)

    def command(output: Path, *overrides: str) -> list[str]:
        changes = [word for change in (*SHORT, *overrides, f"output={output}") for word in ("--set", change)]
        return [sys.executable, "-m", "qlora_kit", "train", str(RECIPE), *changes]

    return command


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter of the run that nothing disturbs."""
    output = tmp_path_factory.mktemp("whole")
    subprocess.run(train(output / "r"), cwd=ROOT, check=True)
    return adapter(output / "r")


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(output / "adapter" / "adapter_model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_run_resumes_to_the_same_adapter(number, code, train, whole, tmp_path):
    child = subprocess.Popen(train(tmp_path / "r"), cwd=ROOT)
    while not list((tmp_path / "r" / "checkpoints").glob("step-000002")) and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(number)
    assert child.wait() == code
    subprocess.run([*train(tmp_path / "r"), "--resume"], cwd=ROOT, check=True)
    assert_same(adapter(tmp_path / "r"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [("memory.resident_blocks=0",), ("memory.resident_blocks=7",)])
def test_blocks_on_disk_end_with_the_same_adapter(overrides, train, whole, tmp_path):
    subprocess.run(train(tmp_path / "r", "memory.placement=disk", *overrides), cwd=ROOT, check=True)
    assert_same(adapter(tmp_path / "r"), whole)
