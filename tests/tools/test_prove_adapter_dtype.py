"""The table of the proof: what is averaged over steps, what over seeds, and that each seed has its own reference."""

from __future__ import annotations

import pytest

from tools.prove_adapter_dtype import ADAPTERS, Curve, apart, table


def test_distance_is_the_mean_of_the_steps_absolute_differences() -> None:
    reference = Curve("fp32", 0, [1.0, 2.0], 0.0, 1.0)
    assert apart(Curve("bf16 without", 0, [1.5, 1.0], 0.0, 1.0), reference) == 0.75
    with pytest.raises(ValueError, match="zip"):
        apart(Curve("bf16 without", 0, [1.5], 0.0, 1.0), reference)


def test_rows_are_means_and_deviations_over_seeds_each_against_its_own_fp32_run() -> None:
    curves = [Curve("fp32", seed, [10.0 * seed], 0.5, 1.0) for seed in (0, 1)]
    curves += [Curve("bf16 with master weights", seed, [10.0 * seed], 0.5 + 0.1 * seed, 0.9) for seed in (0, 1)]
    curves += [Curve("bf16 without", seed, [10.0 * seed + 3 + seed], 2.0, 0.5 + seed) for seed in (0, 1)]
    rows = [line.strip("| ").split(" | ") for line in table(curves)][2:]
    assert [row[0] for row in rows] == list(ADAPTERS)
    assert [row[1] for row in rows] == ["0.5000 ± 0.0000", "0.5500 ± 0.0707", "2.0000 ± 0.0000"]
    assert [row[2] for row in rows] == ["0.0000 ± 0.0000", "0.0000 ± 0.0000", "3.5000 ± 0.7071"]
    assert [row[3] for row in rows] == ["1.0000 ± 0.0000", "0.9000 ± 0.0000", "1.0000 ± 0.7071"]
