"""Random checkpoints are laid out as real ones are, load everywhere, and are made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora_kit.base.loader import load_base
from qlora_kit.base.quantize_model import quantize_model
from qlora_kit.base.shards import Shards, find_shards
from qlora_kit.errors import DiskError
from qlora_kit.recipe import Model
from tools import random_base as module
from tools.random_base import POOL_BYTES, Pool, random_base


def entries(folder: Path) -> dict[str, tuple]:
    shards = Shards(find_shards(folder))
    return {name: (entry.dtype, entry.shape) for name, entry in shards.entries.items()}


def test_has_the_very_tensors_of_a_checkpoint_that_was_quantized(tiny_shape, tmp_path):
    nf4, dense = random_base(tiny_shape, tmp_path), random_base(tiny_shape, tmp_path, dense=True)
    quantize_model(dense, tmp_path / "quantized")
    assert entries(nf4) == entries(tmp_path / "quantized")
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (nf4, tmp_path / "quantized"))
    assert ours == theirs


@pytest.mark.parametrize("dense", [False, True])
def test_trains_as_a_base_does_with_weights_of_the_wanted_size(tiny_shape, tmp_path, dense):
    base = load_base(Model(path=str(random_base(tiny_shape, tmp_path, layers=2, dense=dense))))
    assert len(base.blocks()) == 2
    linears = base.linears()
    assert linears["model.layers.0.mlp.up_proj"].base_weight().float().std() == pytest.approx(0.02, rel=0.05)
    assert linears["model.layers.1.mlp.down_proj"].base_weight().float().std() == pytest.approx(0.01, rel=0.05)
    ids = torch.arange(64)[None]
    assert base.model(input_ids=ids, labels=ids).loss == pytest.approx(torch.tensor(128.0).log().item(), rel=0.1)


@pytest.mark.filterwarnings("ignore")  # transformers' and bitsandbytes' own
def test_transformers_loads_both_forms(tiny_shape, tmp_path):
    from transformers import AutoModelForCausalLM

    ids = torch.arange(32)[None]
    for dense in (False, True):
        folder = str(random_base(tiny_shape, tmp_path, dense=dense))
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(input_ids=ids).logits
        ours = load_base(Model(path=folder, quantization="none" if dense else "nf4")).model(input_ids=ids).logits
        assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()


def test_is_made_once_and_refuses_to_be_mistaken(tiny_shape, tmp_path):
    folder = random_base(tiny_shape, tmp_path)
    file = folder / "model.safetensors"
    made = file.stat().st_mtime_ns
    assert random_base(tiny_shape, tmp_path) == folder and file.stat().st_mtime_ns == made
    with pytest.raises(DiskError, match="another config or seed"):
        random_base(tiny_shape, tmp_path, seed=1)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DiskError, match="cut off"):
        random_base(tiny_shape, tmp_path)


def test_is_split_into_shards_that_are_no_larger_than_asked(tiny_shape, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 40_000)
    folder = random_base(tiny_shape, tmp_path)
    sizes = [path.stat().st_size for path in find_shards(folder)]
    assert len(sizes) > 1 and max(sizes) < 40_000 + 20_000  # and its header
    assert load_base(Model(path=str(folder))).fingerprint == load_base(Model(path=str(folder))).fingerprint


def test_too_little_disk_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(DiskError, match=r"llama-3\.1-405b needs 200\.8 GiB"):
        random_base("llama-3.1-405b", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_pool_gives_every_byte_once_before_any_comes_again():
    pool = Pool(torch.arange(100, dtype=torch.uint8))
    given = b"".join(bytes(piece) for piece in [*pool.take(70), *pool.take(70)])
    assert given == bytes([*range(100), *range(40)])
    assert all(POOL_BYTES % factor for factor in range(2, int(POOL_BYTES**0.5) + 1))
