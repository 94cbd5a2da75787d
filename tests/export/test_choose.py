"""The base to merge onto is chosen by what was measured, and the report says so."""

from __future__ import annotations

import json

import pytest
import torch

from qlora_kit.adapters.inject import branches, inject
from qlora_kit.adapters.store import load_adapter, save_adapter
from qlora_kit.base.loader import load_base
from qlora_kit.data.tokenize import IGNORE_INDEX
from qlora_kit.export.choose import compare, decide, merge_and_prove
from qlora_kit.export.merge import merge_model, open_merge
from qlora_kit.export.score import Scores, plain_model, score
from qlora_kit.export.verify import live_model
from qlora_kit.recipe import Adapter, Model


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def trained(request, tiny_model, tmp_path_factory):
    """Base folder, adapter folder, held-out rows, and how to load the live model."""
    folder, adapter = tiny_model(request.param), tmp_path_factory.mktemp("adapter")
    base = load_base(Model(path=str(folder), quantization="nf4"))
    inject(base, Adapter(rank=4), seed=0)
    for branch in branches(base).values():
        branch.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(branch.index))
    save_adapter(base, adapter)
    rows = [torch.randint(3, 128, (16,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(4)]

    def load(quantization: str):
        kind = {"auto": "nf4", "none": "none"}[quantization]
        live = load_base(Model(path=str(folder), quantization=kind))
        load_adapter(live, adapter)
        return live

    return folder, adapter, [(row, [*row[1:], IGNORE_INDEX]) for row in rows], load


def test_both_candidates_are_scored_as_if_they_had_been_written(trained, tmp_path):
    folder, adapter, rows, load = trained
    merge = open_merge(folder, adapter)
    live = live_model(load("auto"), rows, tmp_path / "logits")
    choice = compare(merge, live)
    for onto in ("dequantized", "original"):
        merge_model(folder, adapter, tmp_path / onto, onto=onto)
        written = score(plain_model(tmp_path / onto), rows, reference=live.logits)
        assert choice[onto]["loss"] == written.loss
        assert choice[onto]["kl"] == written.distance.kl
    assert choice["dequantized"]["kl"] < choice["original"]["kl"]


@pytest.mark.parametrize(
    ("original", "taken"),
    [([9.0, 18.9, 28.0], "original"), ([9.0, 21.0, 29.0], "dequantized"), ([11.0] * 3, "dequantized")],
)
def test_the_original_weights_are_taken_only_where_they_are_better_beyond_doubt(original, taken):
    dequantized = Scores([10.0, 20.0, 29.0], [10, 10, 10], None)
    onto, why = decide(dequantized, Scores(original, [10, 10, 10], None))
    assert onto == taken
    assert "standard errors" in why


@pytest.mark.parametrize("onto", ["auto", "original"])
def test_the_chosen_merge_is_proved_against_its_own_live_model(onto, trained, tmp_path):
    folder, adapter, rows, load = trained
    merge = open_merge(folder, adapter, onto=onto)
    report = merge_and_prove(merge, tmp_path / "m", rows, tmp_path, load=load, choose=onto == "auto")
    assert report.proof["passed"]
    assert (report.proof["choice"] is not None) == (onto == "auto")
    assert json.loads((tmp_path / "m" / "merge_report.json").read_text()) == report.to_json()


def test_a_merge_that_these_documents_proved_is_found_before_anything_is_computed(trained, tmp_path, monkeypatch):
    folder, adapter, rows, load = trained
    loaded = []

    def counted(quantization):
        loaded.append(quantization)
        return load(quantization)

    def again(onto, documents):
        merge = open_merge(folder, adapter, onto=onto)
        return merge_and_prove(merge, tmp_path / "m", documents, tmp_path, load=counted, choose=onto == "auto")

    report = again("auto", rows)
    before = (tmp_path / "m" / "model.safetensors").stat()
    monkeypatch.setattr("qlora_kit.export.output.evidence", None)  # called, it would end the test
    assert (again("auto", rows), loaded) == (report, ["auto"])
    others = again("auto", rows[:2])  # another question: proved again, not written again
    assert (others.proof["tokens"], len(loaded)) == (30, 2)
    assert again(report.onto, rows[:2]).proof["choice"] is None  # nothing to choose: asked and answered anew
    assert (tmp_path / "m" / "model.safetensors").stat() == before
