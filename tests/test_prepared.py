"""The list of prepared recipes: what a head promises is read, and printed so that a person can choose."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.errors import RecipeError
from qlora_kit.prepared import CPU, Promise, find_recipe, prepared_recipes, read_promise, table

GIB = 2**30


def test_what_is_written_as_a_promise_is_read_as_it():
    promise = Promise(20 * GIB, 22 * GIB + GIB // 2, "rtx-4090", 3 << 20, 32 * GIB, 1 << 10, 100 * GIB)
    assert read_promise(f"# about\n{promise}\nmodel:\n", Path("r.yaml")) == promise


@pytest.mark.parametrize("text", ["", "# about\nmodel: {}\n", "# planned: 3 GiB of 4 GiB on rtx-4090\n"])
def test_a_recipe_without_a_promise_is_named(text: str):
    with pytest.raises(RecipeError, match=r"^r\.yaml: no line like # planned: 0 B of 0 B on cpu"):
        read_promise(text, Path("r.yaml"))


def test_recipes_are_in_the_order_of_what_they_need():
    promises = [prepared.promise for prepared in prepared_recipes().values()]
    assert [promise.card != CPU for promise in promises] == sorted(promise.card != CPU for promise in promises)
    budgets = [promise.budget_bytes for promise in promises if promise.card != CPU]
    assert budgets == sorted(budgets)
    assert len(set(budgets)) > 3


def test_a_line_of_the_table_says_what_a_recipe_takes_and_for_whom_it_is():
    entry = prepared_recipes()["llama-3.1-8b-24gb"].to_json()
    assert entry["tokens_per_step"] == 8 * 4096
    heads, line = table([entry | {"peak_bytes": 20 * GIB, "host_bytes": GIB}])
    assert line == (
        "llama-3.1-8b-24gb  Llama-3.1-8B-Instruct  22.5 GiB  20.0 GiB   1.0 GiB       32,768  " + entry["about"]
    )
    assert heads.index("host RAM") == line.index(" 1.0 GiB")


def test_a_recipe_is_found_with_and_without_its_ending():
    assert find_recipe("quickstart") == find_recipe("quickstart.yaml")
