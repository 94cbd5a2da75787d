"""The proof runs the real training code, and says held or killed as the kernel does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import floor, prove_fit
from tools.cgroups import MemoryGroup, NoControlGroup
from tools.harness import Worker


@pytest.fixture
def prove(tiny_shape: str, tmp_path: Path, monkeypatch, capsys):
    """Run the tool on a tiny shape; returns its exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        where = ["--shape", tiny_shape, "--dir", str(tmp_path / "work"), "--threads", "1"]
        monkeypatch.setattr("sys.argv", ["prove_fit", *where, "--seq-len", "32", *arguments])
        code = prove_fit.main()
        assert [path.name for path in (tmp_path / "work").iterdir()] == ["tiny-nf4"]  # runs leave nothing
        return code, capsys.readouterr().out

    return run


def groups_or_skip() -> None:
    try:
        with MemoryGroup(1 << 30, "qlora_kit_probe"):
            pass
    except NoControlGroup as missing:
        pytest.skip(str(missing))


def test_prints_planned_beside_measured_and_the_floor(prove, monkeypatch):
    monkeypatch.setattr(floor, "REPEAT_SECONDS", 0.0)
    code, out = prove("--steps", "2", "--json")
    found = json.loads(out)
    assert code == 0 and not found["killed_by_limit"] and len(found["steps"]) == 2
    assert found["recipe"]["memory"]["placement"] == "disk"
    for name in ("base_nf4", "quant_constants", "adapter", "gradients", "optimizer"):
        assert found["measured"][name] == found["planned"][name], name
    peak = found["steps"][-1]["peak_bytes"]
    assert sum(found["measured"].values()) == max(step["peak_bytes"] for step in found["steps"]) <= 2 * peak
    assert found["peak_anonymous_bytes"] < peak
    assert 0 < found["floor"]["seconds"] < found["steps"][-1]["seconds"]


def test_a_limit_that_is_large_enough_is_said_to_hold(prove):
    groups_or_skip()
    code, out = prove("--limit", "1GiB", "--no-floor")
    assert code == 0
    assert "limit 1.0 GiB: held, page cache included" in out and "adapter" in out


def test_a_limit_that_is_too_small_is_said_to_have_killed(prove):
    groups_or_skip()
    code, out = prove("--limit", "100MiB", "--no-floor")
    assert code == prove_fit.DOES_NOT_FIT
    assert "limit 100.0 MiB: KILLED while loading; it does not fit" in out and "Traceback" not in out


def test_a_worker_that_fails_for_another_reason_is_no_proof_of_the_limit(capsys):
    with Worker(["-c", "raise SystemExit('no such thing')"]) as worker:
        found = prove_fit.run_steps(worker, 1) | {"group": None, "shape": "tiny", "seq_len": 1}
    found["killed_by_limit"] = prove_fit.was_killed(found)
    prove_fit.show(found)
    assert not found["killed_by_limit"] and "no such thing" in capsys.readouterr().out
