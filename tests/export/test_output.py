"""The merged folder is whole or not there; work that was cut is continued, to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from qlora_kit import files
from qlora_kit.adapters.inject import branches, inject
from qlora_kit.adapters.store import save_adapter
from qlora_kit.base.loader import load_base
from qlora_kit.errors import DiskError, LockedError, ModelError
from qlora_kit.export import output
from qlora_kit.export.merge import merge_model, open_merge
from qlora_kit.export.output import write_merged
from qlora_kit.recipe import Adapter, Model


@pytest.fixture(scope="module")
def pair(tiny_model, tmp_path_factory) -> tuple[Path, Path]:
    """A base in several shards, and an adapter of it."""
    folder = tmp_path_factory.mktemp("pair")
    AutoModelForCausalLM.from_pretrained(tiny_model("llama")).save_pretrained(folder / "base", max_shard_size="60KB")
    (folder / "base" / "tokenizer.json").write_text("{}")
    base = load_base(Model(path=str(folder / "base"), quantization="nf4"))
    inject(base, Adapter(rank=4), seed=0)
    for branch in branches(base).values():
        branch.lora_B.data.normal_(0, 0.1)
    save_adapter(base, folder / "adapter")
    return folder / "base", folder / "adapter"


def contents(folder: Path) -> dict[str, str]:
    return {path.name: files.sha256(path) for path in folder.iterdir()}


class Cut(BaseException):
    """A kill."""


def cut_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Let the writing of shard `count` + 1 be cut; the names of the shards that were begun."""
    begun: list[str] = []
    real = output.write_shard

    def write_shard(path, shards, names):
        begun.append(path.name)
        if len(begun) > count:
            path.write_bytes(b"half")
            raise Cut
        return real(path, shards, names)

    monkeypatch.setattr(output, "write_shard", write_shard)
    return begun


def test_a_cut_leaves_no_folder_and_the_rerun_writes_only_what_is_missing(pair, tmp_path, monkeypatch):
    merge_model(*pair, tmp_path / "whole")
    cut_after(monkeypatch, 2)
    with pytest.raises(Cut):
        merge_model(*pair, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    monkeypatch.undo()
    begun = cut_after(monkeypatch, 1000)
    merge_model(*pair, tmp_path / "m")
    assert len(begun) == len(list((tmp_path / "m").glob("model-*"))) - 2 > 0
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"m", "whole"}


@pytest.mark.parametrize("change", ["bytes", "inputs"])
def test_a_finished_shard_of_other_bytes_or_inputs_does_not_count(change, pair, tmp_path, monkeypatch):
    cut_after(monkeypatch, 2)
    with pytest.raises(Cut):
        merge_model(*pair, tmp_path / "m")
    monkeypatch.undo()
    if change == "bytes":
        shard = sorted((tmp_path / ".m.merging" / "model").glob("model-*"))[0]
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    begun = cut_after(monkeypatch, 1000)
    dtype = "bfloat16" if change == "inputs" else "float16"
    merge_model(*pair, tmp_path / "m", dtype=dtype)
    shards = len(list((tmp_path / "m").glob("model-*")))
    assert len(begun) == shards - (1 if change == "bytes" else 0)
    merge_model(*pair, tmp_path / "whole", dtype=dtype)
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")


def test_the_report_holds_every_files_hash_and_the_same_merge_again_writes_nothing(pair, tmp_path, monkeypatch):
    report = merge_model(*pair, tmp_path / "m")
    found = contents(tmp_path / "m")
    del found["merge_report.json"]
    assert report.sha256 == found
    assert {"tokenizer.json", "config.json", "model.safetensors.index.json"} < set(found)
    assert cut_after(monkeypatch, 0) == []
    assert merge_model(*pair, tmp_path / "m") == report


def test_a_damaged_or_other_merge_is_replaced(pair, tmp_path):
    merge_model(*pair, tmp_path / "m", dtype="bfloat16")
    merge_model(*pair, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "float16"
    (tmp_path / "m" / "config.json").write_text("{}")
    report = merge_model(*pair, tmp_path / "m")
    assert files.sha256(tmp_path / "m" / "config.json") == report.sha256["config.json"]


def test_only_an_empty_folder_or_a_merge_is_taken(pair, tmp_path):
    base, adapter = pair
    (tmp_path / "empty").mkdir()
    merge_model(base, adapter, tmp_path / "empty")
    (tmp_path / "empty" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "empty", tmp_path / "file", base, base / "m", adapter, base.parent):
        with pytest.raises(DiskError, match="choose another --out"):
            merge_model(base, adapter, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_too_little_space_is_said_before_anything_is_written(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskError, match="1000 B is free; nothing was written"):
        merge_model(*pair, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_two_merges_into_one_folder_do_not_meet(pair, tmp_path):
    with files.lock(tmp_path / ".m.merging"), pytest.raises(LockedError):
        merge_model(*pair, tmp_path / "m")


def test_a_folder_that_does_not_pass_its_check_is_not_left(pair, tmp_path):
    def refuse(folder: Path) -> dict[str, object]:
        assert (folder / "config.json").is_file()
        raise ModelError("not the same model")

    with pytest.raises(ModelError, match="not the same model"):
        write_merged(open_merge(*pair), tmp_path / "m", refuse)
    assert list(tmp_path.iterdir()) == []
