"""This kit, peft and trl on one small model: the same losses, each with its own memory and time."""

from __future__ import annotations

import argparse
import importlib.util

import pytest

from tools.bench_peers import KIT, KIT_BUDGET, KIT_STREAMED, PEFT, TRL, measure, show


@pytest.mark.slow
def test_contenders_see_the_same_batches_and_agree_on_the_loss(tiny_shape, tmp_path, capsys):
    shared = {"shape": tiny_shape, "dir": tmp_path, "layers": None, "rank": 4, "set": [], "threads": 1}
    without = [] if importlib.util.find_spec("trl") else [TRL]
    own = {"seq_len": 32, "steps": 2, "warm_up": 1, "budget_of_peer": True, "without": without}
    found = measure(argparse.Namespace(**shared, **own), tmp_path)
    contenders = found["contenders"]
    assert set(contenders) == {KIT, PEFT, KIT_STREAMED, KIT_BUDGET, *({TRL} - set(without))}
    for name, of_one in contenders.items():
        assert of_one["losses"] == pytest.approx(contenders[KIT]["losses"], rel=2e-3), name
        assert of_one["peak_bytes"] >= of_one["load_peak_bytes"] * 0.9 > 0
    assert set(found["from_nf4"]) == {KIT, PEFT}
    show(found)
    assert "loss of step" in capsys.readouterr().out
