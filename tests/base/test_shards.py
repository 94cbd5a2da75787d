"""Hostile and damaged safetensors files are refused by file, tensor and rule; good ones round-trip."""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from qlora_kit.base import shards as module
from qlora_kit.base.shards import Shards, bytes_of, find_shards, save_tensors
from qlora_kit.errors import ModelError

TENSORS = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
TENSORS |= {"c": torch.tensor(3.5), "empty": torch.empty(0, 4, dtype=torch.int64)}


def test_what_is_written_reads_back_here_and_in_safetensors(tmp_path):
    save_tensors(tmp_path / "x.safetensors", TENSORS, {"format": "pt"})
    ours, theirs = (
        Shards([tmp_path / "x.safetensors"]),
        safetensors.torch.load_file(tmp_path / "x.safetensors"),
    )
    assert ours.metadata == {"format": "pt"}
    for name, value in TENSORS.items():
        assert torch.equal(ours.read(name), value) and torch.equal(theirs[name], value)


def test_some_rows_of_a_tensor_are_read_in_the_order_asked_for(tmp_path):
    table = torch.arange(20).view(5, 4)
    save_tensors(tmp_path / "x.safetensors", {"first": torch.zeros(3), "table": table})
    shards, found = Shards([tmp_path / "x.safetensors"]), torch.empty(3, 4, dtype=torch.int64)
    shards.read_rows(shards.entry("table"), [4, 0, 3], bytes_of(found.view(torch.uint8).view(-1)))
    assert torch.equal(found, table[[4, 0, 3]])


def test_a_large_tensor_is_read_in_parts_and_a_file_cut_short_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_BYTES", 1000)
    path, large = tmp_path / "x.safetensors", torch.arange(1234)
    save_tensors(path, {"large": large})
    shards = Shards([path])
    assert torch.equal(shards.read("large"), large)
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(ModelError, match="x.safetensors: ends at byte .*, in the middle of a tensor"):
        shards.read("large")


def header_file(path: Path, header: str, data: bytes = b"\0" * 16) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = {
    "twice": ('{"w": {}, "w": {}}', "name 'w' stands twice"),
    "span": (json.dumps({"w": {**GOOD, "shape": [3]}}), "'w': .* is 12 bytes, its entry spans 8"),
    "negative": (json.dumps({"w": {**GOOD, "shape": [-2]}}), "'w': malformed entry"),
    "huge": (json.dumps({"w": {**GOOD, "shape": [0, 1 << 62]}}), "'w': malformed entry"),
    "dtype": (json.dumps({"w": {**GOOD, "dtype": "F7"}}), "'w': malformed entry"),
    "overlap": (json.dumps({"w": GOOD, "v": GOOD}), "overlap"),
    "beyond": (json.dumps({"w": {**GOOD, "data_offsets": [64, 72]}}), "it was cut off"),
    "no JSON": ("{nonsense", "not valid JSON"),
    "list": ("[]", "expected an object"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_header_is_refused_by_file_and_rule(case, tmp_path):
    header, rule = BAD[case]
    path = header_file(tmp_path / "x.safetensors", header)
    with pytest.raises(ModelError, match=rule) as caught:
        Shards([path])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 7, 8, 20, -1])
def test_truncated_file_is_refused(keep, tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=str(path)):
        Shards([path])


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", 3])
def test_index_cannot_leave_the_folder(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ModelError, match="leaves the model folder|not a valid index"):
        find_shards(tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="safetensors"):
        find_shards(tmp_path)


@pytest.mark.parametrize(("first", "second"), [(1, 3), (4096, 8192), (5000, 12_345), (70_000, 9_999)])
def test_reads_past_the_page_cache_give_the_same_bytes(first, second, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": first, "b": second}
    values = {n: torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for n, size in sizes.items()}
    save_tensors(path, values)
    monkeypatch.setattr(module, "DIRECT_BYTES", 8192)
    monkeypatch.setattr(module, "_reused", threading.local())
    shards = Shards([path])
    target = torch.empty(second, dtype=torch.uint8)
    if not shards._fill_past_cache(shards.entries["b"], bytes_of(target)):
        pytest.skip("no direct reads on this file system")
    assert torch.equal(target, values["b"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="ends at byte"):
        shards._fill_past_cache(shards.entries["b"], bytes_of(target))


def test_a_file_system_without_direct_reads_is_read_as_ever(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_tensors(path, {"a": torch.arange(100)})
    shards, real = Shards([path]), os.open

    def refuse(file, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(module, "DIRECT_BYTES", 1)
    shards.past_cache = True
    assert torch.equal(shards.read("a"), torch.arange(100))
