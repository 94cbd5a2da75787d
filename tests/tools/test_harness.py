"""Contenders live in processes of their own, answer when asked, and say how they ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.errors import RecipeError
from qlora_kit.planning.moments import static_ledger
from qlora_kit.planning.shapes import model_shapes, read_config
from tools.harness import Worker, WorkerDied, alternate, process_memory, random_examples, table, write_recipe
from tools.kit_worker import questions
from tools.random_base import random_base

SERVE = """
import os, sys
from tools.harness import serve
print("a library's chatter")
held = bytearray(int(sys.argv[1]) << 20)
count = iter(range(9))
serve(["json"], lambda: {"step": lambda: {"number": next(count)}, "die": lambda: os.abort(), "fail": lambda: 1 / 0})
"""


def worker(mebibytes: int = 1) -> Worker:
    return Worker(["-c", SERVE, str(mebibytes)], threads=1)


def test_workers_answer_in_turn_and_their_memory_is_their_own():
    with worker(1) as small, worker(100) as large:
        answers = alternate({"small": small, "large": large}, steps=2, warm_up=1)
        assert [answer["number"] for answer in answers["small"]] == [1, 2]
        more = large.loaded["libraries_bytes"] - small.loaded["libraries_bytes"]
        assert 90 << 20 <= more <= 110 << 20
        assert process_memory(small.pid)["rss_bytes"] < 90 << 20


@pytest.mark.parametrize(("question", "code", "said"), [("die", -6, "signal 6"), ("fail", 1, "ZeroDivisionError")])
def test_a_worker_that_ends_says_how(question, code, said):
    with worker() as dying, pytest.raises(WorkerDied, match=said) as death:
        dying.ask(question)
    assert death.value.code == code


def test_a_worker_is_gone_when_its_block_ends():
    with worker() as one:
        assert one.loaded["load_s"] >= 0
    with pytest.raises(OSError):
        process_memory(one.pid)


def test_random_examples_learn_every_next_token():
    (first, second) = random_examples(2, 8, 50)
    assert first.targets[:-1] == first.input_ids[1:] and first.learned_tokens == 7
    assert first.input_ids != second.input_ids
    assert random_examples(2, 8, 50) == [first, second]


def test_a_users_set_goes_before_the_tools_own_values(tmp_path):
    values = {"adapter.rank": 4, "memory.placement": "disk", "memory.resident_blocks": 0}
    path, recipe, plan = write_recipe(tmp_path, Path("llama-2-7b"), values, ["adapter.rank=8"])
    assert recipe.adapter.rank == 8 and plan.streamed_blocks == 32
    assert "rank: 8" in path.read_text()
    with pytest.raises(RecipeError, match=r"did you mean 'adapter\.rank'"):
        write_recipe(tmp_path, Path("llama-2-7b"), values, ["adapter.rnak=8"])


@pytest.mark.parametrize("placement", ["device", "disk"])
def test_the_tensors_of_a_run_are_the_plans_static_components_to_the_byte(tiny_shape, tmp_path, placement):
    model = random_base(tiny_shape, tmp_path)
    values = {"data.seq_len": 32, "memory.placement": placement, "memory.resident_blocks": 1}
    path, recipe, _ = write_recipe(tmp_path, model, values)
    asked = questions(path, 1, tmp_path / "gradients")
    loss = asked["step"]()["loss"]
    found = asked["components"]()["components"]
    planned = static_ledger(model_shapes(*read_config(str(model))), recipe, 0)
    assert 0 < found.pop("workspace") <= planned["workspace"]  # as large as it had to grow
    assert found == {name: planned[name] for name in found} and len(found) == 6
    assert 4 < loss < 6 and (tmp_path / "gradients").stat().st_size > found["gradients"]


def test_tables_line_up():
    assert table([["a", "long"], ["bcd", 1.0]]) == "a     long\nbcd  1.000"
