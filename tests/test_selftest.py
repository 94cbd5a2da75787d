"""`selftest` proves what it says, on the CPU and on the simulated accelerator, and sees what is broken."""

from __future__ import annotations

import json
import subprocess
import sys

import bitsandbytes.functional as functional
import pytest
import torch

from qlora_kit import selftest
from qlora_kit.base.linear import Dropout
from qlora_kit.base.streaming import Piece
from qlora_kit.profiling.simulated_device import simulated_device


@pytest.mark.slow  # half a minute
def test_every_promise_holds_on_the_cpu():
    done = subprocess.run(
        [sys.executable, "-m", "qlora_kit", "selftest", "--device", "cpu", "--json"], capture_output=True, text=True
    )
    proofs = json.loads(done.stdout)["proofs"]
    assert [proof for proof in proofs if not proof["passed"]] == []
    assert {proof["promise"] for proof in proofs} == set(selftest.PROOFS)
    assert done.returncode == 0


@pytest.mark.slow  # a minute; tests/base and tests/training hold each of them there on their own
def test_every_promise_holds_on_a_device_with_late_copies(monkeypatch):
    monkeypatch.setattr(functional, "name2qmap", dict(functional.name2qmap))  # bitsandbytes keeps tables for good
    with simulated_device():
        proofs = list(selftest.run(torch.device("simgpu")))
    assert [proof for proof in proofs if not proof.passed] == []


def failed(monkeypatch: pytest.MonkeyPatch, suspect: str) -> str:
    """Which of the proofs that speak of `suspect` fail once something is broken."""
    proofs = {promise: prove for promise, prove in selftest.PROOFS.items() if suspect in promise}
    monkeypatch.setattr(selftest, "PROOFS", proofs)
    found = [proof.promise for proof in selftest.run(torch.device("cpu")) if not proof.passed]
    monkeypatch.undo()
    return "; ".join(found)


def test_a_block_that_arrives_damaged_is_seen(monkeypatch):
    real = Piece.view
    monkeypatch.setattr(Piece, "view", lambda piece, buffer: real(piece, buffer).roll(1))
    assert "streamed from host" in failed(monkeypatch, "streamed from host")


def test_dropout_that_is_not_repeated_is_seen(monkeypatch):
    monkeypatch.setattr(Dropout, "__call__", lambda dropout, x: x * torch.rand_like(x))
    assert "recomputed" in failed(monkeypatch, "recomputed")


def test_a_failure_is_said_and_ends_with_1(monkeypatch, capsys):
    def broken(bench: selftest.Bench) -> str:
        raise selftest.ProofFailed("3 of 4 tensors differ")

    monkeypatch.setattr(selftest, "PROOFS", {"a promise": broken})
    (proof,) = selftest.report(selftest.run(torch.device("cpu")), torch.device("cpu"))
    assert not proof.passed
    assert "FAILED  a promise  3 of 4 tensors differ" in capsys.readouterr().out
