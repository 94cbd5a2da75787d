"""The proof's data fill its rows, and a case stands or falls by the process' own figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from qlora_kit.data.tokenize import load_examples, load_tokenizer
from qlora_kit.recipe import load_recipe
from tools import prove_rss
from tools.prove_rss import Case, run_case


@pytest.mark.parametrize("lengths_of", [None, (0.2, 1)])
def test_a_case_trains_on_rows_of_its_length_and_reads_the_runs_own_figures(
    lengths_of: tuple[float, float] | None, tiny_shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def train(path: Path, threads: int | None) -> None:
        recipe = load_recipe(path)
        examples, _ = load_examples(Path(recipe.data.train), recipe.data, load_tokenizer(Path(recipe.model.path)))
        lengths.extend(len(example.input_ids) for example in examples)
        Path(recipe.output).mkdir()
        (Path(recipe.output) / "memory.json").write_text(json.dumps({"measured": {"peak_bytes": 1 << 20}}))

    monkeypatch.setattr(prove_rss, "train", train)
    options = argparse.Namespace(dir=tmp_path, layers=None, rank=4, set=[], threads=1)
    found = run_case(Case("tiny", tiny_shape, 2, {"data.seq_len": 64}, lengths=lengths_of), options, tmp_path)
    assert max(lengths) <= 64 and (min(lengths) == 64) is (lengths_of is None)
    assert found["off"] == found["planned"] / (1 << 20) - 1
    assert found["planned"] == sum(found["components"].values())


def test_no_two_cases_have_a_name() -> None:
    assert len({case.name for case in prove_rss.CASES}) == len(prove_rss.CASES)
