"""Plans hold: the real training code takes, on a simulated device, what was planned for it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from qlora_kit.profiling.simulate import measure
from tools.prove_simulated import CASES, Case, Proof, main, plan_case, prove

SHALLOW = [
    Case("70b", "llama-3-70b", 8, 7.2, ("data.seq_len=2048",), layers=8),
    Case("70b, some on disk", "llama-3-70b", 8, 7.2, ("data.seq_len=2048",), layers=8, host_gib=2),
    Case("7b, kept", "llama-2-7b", 6, 5.5, ("data.seq_len=512", "memory.gradient_checkpointing=auto"), layers=8),
]


def assert_holds(proof: Proof) -> None:
    assert 0.99 * proof.measured_bytes <= proof.planned_bytes <= 1.03 * proof.measured_bytes
    assert proof.measured_bytes <= proof.budget_bytes
    assert proof.measured_host_bytes <= proof.planned_host_bytes <= 1.05 * proof.measured_host_bytes + (1 << 20)


@pytest.mark.parametrize("case", SHALLOW, ids=lambda case: case.name)
def test_plans_of_some_blocks_hold(case):
    assert_holds(prove(case))


def test_one_byte_less_than_is_needed_is_an_error(tmp_path):
    recipe, _ = plan_case(SHALLOW[0], tmp_path)
    needed = measure(recipe).device_bytes
    assert measure(recipe, needed).device_bytes == needed
    with pytest.raises(torch.OutOfMemoryError):
        measure(recipe, needed - 512)


def test_cases_are_printed_as_json(capsys, monkeypatch):
    monkeypatch.setattr("tools.prove_simulated.CASES", [replace(SHALLOW[2], name="7b"), SHALLOW[0]])
    main(["7b", "--json"])
    (proof,) = json.loads(capsys.readouterr().out)
    assert proof["case"] == "7b" and proof["planned_bytes"] > 1 << 30


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plans_hold(case, capsys):
    proof = prove(case)
    with capsys.disabled():
        print(proof)
    assert_holds(proof)
