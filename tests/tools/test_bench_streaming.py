"""What the benchmark says of gradients and of memory follows from what it measured."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from qlora_kit.base.shards import save_tensors
from tools.bench_streaming import compare, depth, show_peaks, show_times, show_together, times, together


@pytest.fixture
def options(tiny_shape: str, tmp_path: Path) -> argparse.Namespace:
    shared = {"shape": tiny_shape, "dir": tmp_path, "layers": None, "rank": 4, "set": [], "threads": 1}
    own = {"seq_len": 32, "steps": 1, "micro_batches": 3, "read_limit": None, "cold": True, "values": [2, 4]}
    return argparse.Namespace(**shared, **own)


def test_gradients_are_compared_by_norm_and_tensor_by_tensor(tmp_path):
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    save_tensors(tmp_path / "one", {"a": a, "b": b})
    save_tensors(tmp_path / "other", {"a": a, "b": b + torch.tensor([0.0, 0.5])})
    found = compare(tmp_path / "one", tmp_path / "other")
    assert (found["tensors"], found["bit_equal"]) == (2, 1)
    assert found["worst_tensor"] == pytest.approx(0.5 / 2.5)
    assert found["relative_difference"] == pytest.approx(0.5 / (25 + 6.25) ** 0.5)


@pytest.mark.slow
def test_streamed_steps_are_measured_beside_resident_ones(options, tmp_path, capsys):
    found = times(options, tmp_path)
    assert list(found["placements"]) == ["device", "host", "disk"]
    assert all(row["same_losses"] for row in found["placements"].values())
    assert found["placements"]["device"]["ratio"] == 1.0
    show_times(found)
    assert "x resident" in capsys.readouterr().out


@pytest.mark.slow
def test_both_orders_of_accumulation_see_the_same_data_and_gradients(options, tmp_path, capsys):
    found = together(options, tmp_path)
    assert found["cold"] and found["loss"]["together"] == pytest.approx(found["loss"]["one by one"], rel=1e-5)
    assert found["gradients"]["tensors"] == 3 * 7 * 2 and found["gradients"]["relative_difference"] < 1e-2
    show_together(found)
    assert "bit-equal" in capsys.readouterr().out


@pytest.mark.slow
def test_peaks_stand_beside_the_plans(options, tmp_path, capsys):
    found = depth(options, tmp_path)
    assert list(found["cases"]) == [2, 4]
    assert found["cases"][4]["trained_bytes"] == 2 * found["cases"][2]["trained_bytes"]
    show_peaks(found)
    assert "slope" in capsys.readouterr().out
