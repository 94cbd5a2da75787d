"""Lengths of a file: hand-made ones come out as they were made, and rows are those that a run trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qlora_kit.data.batches import Batches
from qlora_kit.data.lengths import Lengths, measure
from qlora_kit.data.tokenize import load_examples
from qlora_kit.errors import DataError
from qlora_kit.recipe import Recipe, recipe_for_model

LENGTHS = [20, 20, 30, 40, 50, 60, 100, 200, 300, 500]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a letter."""
    letters = {text: index for index, text in enumerate(["</s>", *map(chr, range(32, 127))])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, [])), eos_token="</s>")


def write(path: Path, lengths: list[int]) -> Path:
    """Prompts of 2 tokens, an answer, and the token that ends it."""
    rows = [{"prompt": "ab", "completion": chr(97 + n % 26) * (length - 3)} for n, length in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(*overrides: str) -> Recipe:
    return recipe_for_model("m", ["data.seq_len=256", "train.grad_accumulation=2", *overrides])


def found(tmp_path: Path, tokenizer: Any, *overrides: str) -> Lengths:
    return measure(write(tmp_path / "t.jsonl", LENGTHS), recipe(*overrides), tokenizer)


def test_every_document_is_measured_before_any_cut(tmp_path: Path, tokenizer: Any) -> None:
    measured = found(tmp_path, tokenizer)
    assert measured.tokens == tuple(LENGTHS)
    assert [measured.percentile(percent) for percent in (10, 50, 90, 99)] == [20, 50, 300, 500]
    assert measured.histogram() == [(32, 3), (64, 3), (128, 1), (256, 1), (512, 2)]


def test_what_seq_len_cuts_is_counted(tmp_path: Path, tokenizer: Any) -> None:
    measured = found(tmp_path, tokenizer)
    assert measured.cut == 2
    assert measured.lost_share == pytest.approx((300 - 256 + 500 - 256) / sum(LENGTHS))
    assert found(tmp_path, tokenizer, "data.seq_len=512").lost_share == 0


def test_rows_without_packing_are_the_documents_and_their_padding(tmp_path: Path, tokenizer: Any) -> None:
    measured = found(tmp_path, tokenizer, "data.packing=false", "train.micro_batch=2")
    assert measured.rows == measured.unpacked == (20, 20, 30, 40, 50, 60, 100, 200, 256, 256)
    positions = 2 * (32 + 64 + 64 + 224 + 256)
    assert measured.padding == measured.unpacked_padding == pytest.approx(1 - sum(measured.rows) / positions)
    assert (measured.longest_row, measured.steps_per_epoch) == (256, 3)


def test_packed_rows_are_padded_to_the_longest(tmp_path: Path, tokenizer: Any) -> None:
    measured = found(tmp_path, tokenizer)
    positions = len(measured.rows) * measured.longest_row
    assert measured.padding == pytest.approx(1 - sum(measured.rows) / positions)
    assert positions > sum(measured.rows)


@pytest.mark.parametrize("overrides", [(), ("data.packing=false",), ("data.seq_len=1024", "data.packing=false")])
def test_a_run_has_these_rows_and_steps(tmp_path: Path, tokenizer: Any, overrides: tuple[str, ...]) -> None:
    measured, settings = found(tmp_path, tokenizer, *overrides), recipe(*overrides)
    examples, _ = load_examples(tmp_path / "t.jsonl", settings.data, tokenizer)
    shape: dict[str, Any] = {"seq_len": settings.data.seq_len, "packing": settings.data.packing}
    run = Batches(examples, micro_batch=1, grad_accumulation=2, **shape, seed=0, pad_id=0)
    assert run.steps_per_epoch == measured.steps_per_epoch
    assert run.longest().input_ids.shape[1] == measured.longest_row
    rows = [batch.tokens for step in range(run.steps_per_epoch) for batch in run.step(step)]
    assert sorted(rows) == sorted(measured.rows)


def test_packing_gains_rows(tmp_path: Path, tokenizer: Any) -> None:
    measured = found(tmp_path, tokenizer)
    assert len(measured.rows) < len(measured.unpacked) == 10
    assert sum(measured.rows) == sum(measured.unpacked)
    assert measured.mean_row == -(-sum(measured.rows) // len(measured.rows))


def test_what_is_held_out_is_no_row(tmp_path: Path, tokenizer: Any) -> None:
    measured = found(tmp_path, tokenizer, "data.eval=0.2", "data.packing=false")
    assert (len(measured.tokens), len(measured.rows)) == (10, 8)


def test_a_long_text_goes_on_and_loses_nothing(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a" * 999}) + "\n")
    measured = measure(tmp_path / "t.jsonl", recipe("data.packing=false"), tokenizer)
    assert (measured.tokens, measured.cut, measured.lost_share) == ((1000,), 1, 0.0)
    assert measured.rows == (256, 256, 256, 235)  # neighbours share a token


def test_people_and_programs_are_told_the_same(tmp_path: Path, tokenizer: Any) -> None:
    measured = found(tmp_path, tokenizer)
    text, values = "\n".join(measured.describe()), json.loads(json.dumps(measured.to_json()))
    assert values["percentiles"] == {"p10": 20, "p50": 50, "p90": 300, "p99": 500, "longest": 500}
    assert f"packed: {values['rows']} rows" in text and f"{values['steps_per_epoch']} steps an epoch" in text
    assert "10 % up to 20, 50 % up to 50, 90 % up to 300, 99 % up to 500 tokens" in text
    assert "seq_len 256 is too short for 2 of them (20.0 %)" in text
    assert text.count("█") > 24


def test_a_line_of_no_use_is_named(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match="t.jsonl:1"):
        measure(tmp_path / "t.jsonl", recipe(), tokenizer)
