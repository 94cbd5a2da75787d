"""Both contenders of `bench_plan` run, and a failure is not taken for a fast answer."""

from __future__ import annotations

import pytest

from qlora_kit.errors import QLoRAKitError
from tools.bench_plan import measure, seconds_of


@pytest.mark.slow
def test_both_answer_without_a_hub_and_the_plan_is_faster() -> None:
    found = measure("smollm2-135m", runs=1)
    (kit,), (accelerate,) = found.values()
    assert 0 < kit < accelerate


def test_a_process_that_fails_or_says_nothing_is_an_error() -> None:
    with pytest.raises(QLoRAKitError, match="ended with code 3"):
        seconds_of(["-c", "print('x'); raise SystemExit(3)"])
    with pytest.raises(QLoRAKitError, match="ended with code 0"):
        seconds_of(["-c", ""])
