"""Plans of other stacks hold on real GPUs: a handful of published peaks, each with its source in the data file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.check_published import (
    LIMITS,
    STATIC_LIMIT,
    Check,
    check_all,
    check_bound,
    check_row,
    config_of,
    main,
    on_the_right_side,
    stack_of,
    tier_of,
)

POINTS = Path(__file__).with_name("published_points.jsonl")
ROWS: dict[str, dict[str, Any]] = {
    row["id"]: row for row in map(json.loads, POINTS.read_text(encoding="utf-8").splitlines())
}
PEAKS = [name for name, row in ROWS.items() if row["kind"] == "train_peak"]
BOUNDS = sorted(ROWS.keys() - set(PEAKS))
EXACT = [name for name in PEAKS if ROWS[name]["static_alloc_bytes"] and "bigcode" not in name]


def checked(name: str) -> Check:
    tier = tier_of(ROWS[name])
    assert tier is not None
    return check_row(ROWS[name], tier)


@pytest.mark.parametrize("name", PEAKS)
def test_a_published_peak_is_planned_within_the_limit_of_its_tier(name: str) -> None:
    check = checked(name)
    assert abs(check.error) <= LIMITS[check.tier]


@pytest.mark.parametrize("name", EXACT)
def test_static_bytes_are_those_of_torchs_allocator(name: str) -> None:
    error = checked(name).static_error
    assert error is not None
    assert abs(error) <= STATIC_LIMIT / 50


@pytest.mark.parametrize("name", [name for name in EXACT if "Mixtral-8x7B-Instruct-v0.1-g1-bs4" not in name])
def test_byte_exact_peaks_of_dense_models_are_planned_within_a_fifth_of_a_percent(name: str) -> None:
    assert abs(checked(name).error) <= 0.002


def test_a_version_of_transformers_is_told_apart_by_the_note() -> None:
    newer, older = (ROWS[f"fms-{name}-none-Mistral-7B-v0.1-g1-bs4"] for name in ("a100", "tf444"))
    assert (stack_of(newer), stack_of(older)) == ("tf4.48", "tf4.45")
    assert checked(newer["id"]).planned > checked(older["id"]).planned


@pytest.mark.parametrize("name", BOUNDS)
def test_what_fits_and_what_does_not_is_said_so(name: str) -> None:
    check = check_bound(ROWS[name])
    assert check is not None
    assert on_the_right_side(check)


def test_a_plan_on_the_wrong_side_of_a_bound_is_seen() -> None:
    fits = check_bound(ROWS["unsloth-ctx-8b-24-HF+FA2"] | {"peak_bytes": 2**30})
    fails = check_bound(ROWS["hfblog-llama-7b-nf4-nogc-s1024"] | {"peak_bytes": 2**40})
    assert fits is not None
    assert fails is not None
    assert not on_the_right_side(fits)
    assert not on_the_right_side(fails)


def test_nothing_of_a_rows_peak_goes_into_its_plan() -> None:
    row = ROWS[PEAKS[0]]
    assert check_row(row | {"peak_bytes": 1, "static_alloc_bytes": 2}, "1").planned == checked(PEAKS[0]).planned


def test_rows_that_cannot_judge_are_left_out() -> None:
    row = ROWS[PEAKS[0]]
    for change in ({"num_gpus": 2}, {"quant": "gptq4"}, {"kind": "inference"}, {"completeness": "vague"}):
        assert tier_of(row | change) is None


def test_a_row_without_a_length_or_a_shape_is_not_answered() -> None:
    row = ROWS["fsdpq-nb-qlora-gc-s3072"]
    _, unanswered = check_all([row | {"seq_len": None}, row | {"arch": {}}])
    assert [line.partition(": ")[2] for line in unanswered] == ["KeyError: 'seq_len'", "KeyError: 'mlp'"]


def test_a_model_is_known_by_its_name_and_shape() -> None:
    kinds = {ROWS[name]["model"]: config_of(ROWS[name])["model_type"] for name in PEAKS}
    assert kinds["mistralai/Mixtral-8x7B-Instruct-v0.1"] == "mixtral"
    assert kinds["bigcode/gpt_bigcode-santacoder"] == "gpt_bigcode"
    assert kinds["meta-llama/Meta-Llama-3-8B"] == "llama"


def test_the_table_counts_rows_and_names_those_over_their_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [ROWS[PEAKS[0]], ROWS[PEAKS[1]] | {"id": "fms-wrong", "peak_bytes": 2**35}]
    points = tmp_path / "points.jsonl"
    points.write_text("\n".join(map(json.dumps, rows)))
    assert main([str(points)]) == 0
    said = capsys.readouterr().out
    assert "| 1 | 2 / 2 |" in said
    assert "1 (limit 3%)" in said
    assert "fms-wrong: -" in said
    assert PEAKS[0] not in said
    main([str(points), "--json"])
    assert [check["id"] for check in json.loads(capsys.readouterr().out)["checks"]] == [PEAKS[0], "fms-wrong"]
