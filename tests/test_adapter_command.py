"""The commands on adapter folders: what they print, and what they refuse before any work."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from qlora_kit.adapter_command import app
from qlora_kit.errors import DiskError, RecipeError
from tests.peft_adapters import made_by_peft


@pytest.fixture(scope="module")
def pair(tiny_model, tmp_path_factory):
    """Two adapters of one base, by a name that the commands take."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("a", "b")):
        made_by_peft(tiny_model("llama"), "llama", folder / name, seed=seed, target_modules=["q_proj", "up_proj"])
    return str(folder / "a"), str(folder / "b")


def said(*words: object) -> str:
    """What a command prints on stdout."""
    ended = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.stdout


def test_show_prints_a_table_and_every_linear_as_json(pair, tmp_path):
    text = said("show", pair[0], "--png", tmp_path / "a.png")
    assert "mlp.up_proj" in text
    assert "fingerprint  not recorded" in text
    assert (tmp_path / "a.png").stat().st_size > 1000
    found = json.loads(said("show", pair[0], "--json"))
    assert len(found["updates"]) == 4
    assert found["parameters"] == 2 * 4 * (64 + 64) + 2 * 4 * (64 + 96)


def test_compose_states_the_error_of_each_layer_and_of_all(pair, tmp_path):
    lines = said("compose", *pair, "--weights", "0.7,-0.3", "--method", "cat", "--out", tmp_path / "out").splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["layer", "0", "1", "all"]
    assert float(lines[3].split()[-1]) < 1e-6
    found = json.loads(said("compose", *pair, "--out", tmp_path / "linear", "--json"))
    assert found["weights"] == [1.0, 1.0]
    assert found["total"]["relative_error"] > 0.5
    assert len(found["linears"]) == 4


def test_resize_states_ranks_and_error(pair, tmp_path):
    lines = said("resize", pair[0], "--rank", 2, "--out", tmp_path / "out").splitlines()
    assert lines[3].split()[:3] == ["all", "4", "2"]
    assert len(json.loads(said("resize", pair[0], "--energy", 0.9, "--out", tmp_path / "e", "--json"))["linears"]) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compose", "A", "--out", "o"], "at least two adapters"),
        (["compose", "A", "B", "--weights", "1", "--out", "o"], "--weights: 2 numbers"),
        (["compose", "A", "B", "--weights", "1,nan", "--out", "o"], "--weights: 2 numbers"),
        (["compose", "A", "B", "--weights", "0,0", "--out", "o"], "not all zero"),
        (["compose", "A", "B", "--method", "tise", "--out", "o"], "did you mean 'ties'"),
        (["compose", "A", "B", "--rank", "3", "--out", "o"], "--rank: goes with --method svd"),
        (["compose", "A", "B", "--method", "ties", "--density", "0", "--out", "o"], "--density: above 0"),
        (["resize", "A", "--out", "o"], "one of --rank and --energy"),
        (["resize", "A", "--rank", "2", "--energy", "0.9", "--out", "o"], "one of --rank and --energy"),
        (["resize", "A", "--energy", "1.5", "--out", "o"], "--energy: above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(words, message):
    with pytest.raises(RecipeError, match=message):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_a_folder_that_is_there_is_refused_before_anything_is_read(tmp_path):
    for words in (["compose", "nowhere", "nowhere"], ["resize", "nowhere", "--rank", "2"]):
        with pytest.raises(DiskError, match="already exists"):
            CliRunner().invoke(app, [*words, "--out", str(tmp_path)], catch_exceptions=False)
