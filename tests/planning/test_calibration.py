"""What was measured here changes the next plan for the same device, and nothing about it can stop a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.planning.calibration import OFF, calibrated, calibration_file, remember
from qlora_kit.planning.hardware import CPU_RUNTIME_BYTES, device_for
from qlora_kit.planning.planner import make_plan
from qlora_kit.planning.report import meaning
from qlora_kit.recipe import recipe_for_model

GIB = 1 << 30


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(OFF)
    return tmp_path


def test_figures_are_kept_beside_those_of_before_and_of_other_devices() -> None:
    remember("a", runtime_bytes=7)
    remember("b", runtime_bytes=9)
    remember("a", operations_s=2.5)
    assert (calibrated("a"), calibrated("b"), calibrated("c")) == (
        {"runtime_bytes": 7, "operations_s": 2.5},
        {"runtime_bytes": 9},
        {},
    )


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": {"runtime_bytes": -1, "x": "y"}}', '{"a": {"x": NaN}}'])
def test_a_file_that_is_not_what_it_should_be_says_nothing(text: str) -> None:
    calibration_file().parent.mkdir()
    calibration_file().write_text(text)
    assert calibrated("a") == {}


def test_a_cache_that_cannot_be_written_is_a_note(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (cache / "qlora_kit").write_text("a file where the folder should be")
    remember("a", runtime_bytes=7)
    assert "not kept for later plans" in capfd.readouterr().err


def test_the_switch_stops_reading_and_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    remember("a", runtime_bytes=7)
    monkeypatch.setenv(OFF, "1")
    remember("b", runtime_bytes=7)
    assert calibrated("a") == {}
    monkeypatch.delenv(OFF)
    assert (calibrated("a"), calibrated("b")) == ({"runtime_bytes": 7}, {})


def test_a_plan_for_the_same_device_counts_what_was_measured_and_says_so() -> None:
    recipe = recipe_for_model("llama-3.2-1b", ["train.device=cpu"])
    before = make_plan(recipe, budget_bytes=2 * GIB)
    remember("cpu", runtime_bytes=CPU_RUNTIME_BYTES + 1000, operations_s=1e11)
    after = make_plan(recipe, budget_bytes=2 * GIB)
    assert after.components["runtime"] == before.components["runtime"] + 1000
    assert "measured" in meaning(after, "runtime") and "measured" not in meaning(before, "runtime")
    assert before.estimated is None and after.estimated is not None and after.estimated.step_s > 0
    assert device_for("auto", gpu="rtx-4090").measured_bytes is None
