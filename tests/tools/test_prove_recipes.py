"""The tool that holds recipes to their promise, and writes what they promise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_kit.prepared import find_recipe, prepared_recipes, read_promise
from tools.prove_recipes import main, write_promise

NAME = "llama-3.2-1b-cpu"


def test_a_stale_promise_is_written_anew_and_nothing_else(tmp_path):
    prepared = prepared_recipes()[NAME]
    stale = replace(prepared.promise, peak_bytes=1 << 30, host_bytes=1 << 30)
    copy = replace(prepared, path=tmp_path / "r.yaml", promise=stale)
    text = prepared.path.read_text()
    copy.path.write_text(text.replace(str(prepared.promise), str(stale)))
    assert copy.path.read_text() != text
    write_promise(copy)
    assert copy.path.read_text() == text
    assert read_promise(text, copy.path) == prepared.promise


def test_an_unknown_recipe_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["nosuch"])
    assert "no such recipe: nosuch; there are quickstart" in capsys.readouterr().err
    assert find_recipe("quickstart").is_file()
