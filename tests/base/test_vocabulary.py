"""Embedding and head that live elsewhere give the results of those on the device, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.adapters.inject import branches, inject, trainable_parameters
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base import vocabulary
from qlora_kit.base.loader import Base, load_base
from qlora_kit.base.quantize_model import quantize_model
from qlora_kit.base.shards import Shards
from qlora_kit.base.streaming import Placement
from qlora_kit.base.vocabulary import FetchedHead
from qlora_kit.errors import ModelError
from qlora_kit.profiling.simulated_device import simulated_device
from qlora_kit.recipe import Adapter, Model
from qlora_kit.training.blocks import attach
from qlora_kit.training.loss import batch_losses, chunked_cross_entropy


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that the vocabulary of 128 is several chunks, the last one smaller."""
    monkeypatch.setattr(vocabulary, "LOSS_CHUNK_VOCABULARY", 48)
    monkeypatch.setitem(chunked_cross_entropy.__kwdefaults__, "chunk_vocabulary", 48)


def loaded(folder: Path, embeddings: str, device: str = "cpu", tier: str = "device", **model: str) -> Base:
    return load_base(Model(path=str(folder), **model), device, Placement(tier, 0, embeddings))


def step(base: Base, ids: torch.Tensor) -> list[torch.Tensor]:
    """Loss, gradients of the adapter, and the loss without gradient, on the host."""
    inject(base, Adapter(rank=4), seed=0)
    for branch in branches(base).values():
        generator = torch.Generator().manual_seed(branch.index)
        branch.lora_B.data.copy_(torch.randn(branch.lora_B.shape, generator=generator))
    attach(base)
    targets = ids.roll(-1, 1).masked_fill(torch.arange(ids.shape[1]) < 5, -100)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    batch = SimpleNamespace(input_ids=ids, position_ids=positions, targets=targets)
    loss = batch_losses(base, [batch], 16)[0]
    loss.backward()
    with torch.no_grad():
        found = [loss.detach(), batch_losses(base, [batch], 16)[0]]
    return [value.cpu() for value in (*found, *(p.grad for _, p in trainable_parameters(base)))]


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other) > 3
    assert all(a.any() and torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_loss_and_gradients_from_disk_are_bit_identical(model_type, tiny_model, ids):
    folder = tiny_model(model_type)
    base = loaded(folder, "disk")
    assert isinstance(base.model.get_output_embeddings(), FetchedHead)
    assert_same(step(base, ids), step(loaded(folder, "device"), ids))


@pytest.mark.parametrize("embeddings", ["host", "disk"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "gpt2"])
def test_a_device_with_late_copies_gives_the_cpus_bits(model_type, embeddings, tiny_model, ids):
    expected = step(loaded(tiny_model(model_type), "device"), ids)
    with simulated_device():
        assert_same(step(loaded(tiny_model(model_type), embeddings, "simgpu"), ids), expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_files_hold_in_another_dtype_is_cast_as_it_comes(dtype, stored, tiny_model, ids):
    folder = tiny_model("llama", stored)
    expected = step(loaded(folder, "device", dtype=dtype, quantization="none"), ids)
    with simulated_device():
        for embeddings in ("host", "disk"):
            base = loaded(folder, embeddings, "simgpu", dtype=dtype, quantization="none")
            assert_same(step(base, ids), expected)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_blocks_and_vocabulary_are_streamed_together(tier, tiny_model, tmp_path, ids):
    quantize_model(tiny_model("llama"), tmp_path / "q")
    expected = step(loaded(tmp_path / "q", "device"), ids)
    with simulated_device():
        assert_same(step(loaded(tmp_path / "q", tier, "simgpu", tier), ids), expected)


@pytest.mark.parametrize(("model_type", "tensors"), [("llama", 2), ("qwen2", 1)])  # the second ties them
@pytest.mark.parametrize("embeddings", ["host", "disk"])
def test_on_the_device_there_is_nothing_of_them_between_passes(embeddings, model_type, tensors, tiny_model):
    folder, held = tiny_model(model_type, torch.bfloat16), {}
    for where in ("device", embeddings):
        with simulated_device() as device:
            base = loaded(folder, where, "simgpu")
            base.model(input_ids=torch.ones(1, 3, dtype=torch.long, device="simgpu"))
            torch.accelerator.synchronize()
            held[where] = device.live_bytes
            pinned_bytes = device.pinned_bytes
    assert held["device"] - held[embeddings] == tensors * 128 * 64 * 2
    assert pinned_bytes == (tensors * 128 * 64 * 2 if embeddings == "host" else 0)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_on_disk_no_tensor_is_read_whole_and_each_row_once(model_type, tiny_model, ids, monkeypatch):
    whole, rows = [], []
    read, read_rows = Shards.read, Shards.read_rows

    def watch_rows(self, entry, wanted, target):
        rows.extend(wanted)
        read_rows(self, entry, wanted, target)

    monkeypatch.setattr(Shards, "read", lambda self, name: whole.append(name) or read(self, name))
    monkeypatch.setattr(Shards, "read_rows", watch_rows)
    base = loaded(tiny_model(model_type), "disk")
    base.model.get_input_embeddings()(ids)
    assert rows == sorted(set(ids.flatten().tolist()))
    assert whole and not {"model.embed_tokens.weight", "lm_head.weight"} & set(whole)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_logits_are_those_of_the_whole_head(model_type, tiny_model, ids):
    bases = [loaded(tiny_model(model_type), embeddings, dtype="float32") for embeddings in ("device", "disk")]
    with torch.no_grad():
        expected, found = (base.model(input_ids=ids).logits for base in bases)
    assert found.shape == (2, 24, 128)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_pass_through_the_logits(tiny_model):
    heads = [loaded(tiny_model("llama"), where, dtype="float32").model.lm_head for where in ("device", "disk")]
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected, found = (torch.autograd.grad(head(hidden).sin().sum(), hidden)[0] for head in heads)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_generation_writes_the_same(model_type, tiny_model, ids):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected, found = (
        loaded(tiny_model(model_type), where, dtype="float32").model.generate(ids, **options)
        for where in ("device", "disk")
    )
    assert torch.equal(found, expected) and found.shape == (2, 32)


def test_host_is_the_device_itself_on_a_cpu(tiny_model):
    assert loaded(tiny_model("llama"), "host").model.lm_head.weight.any()


def test_a_head_in_4_bits_stays_on_the_device_and_that_is_said(tiny_model, tmp_path, ids, capsys):
    folder = tmp_path / "q"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["k_proj"])
    AutoModelForCausalLM.from_pretrained(tiny_model("llama"), quantization_config=config).save_pretrained(folder)
    expected = step(loaded(folder, "device"), ids)
    base = loaded(folder, "disk")
    assert "lm_head.weight is in 4 bits; it is dequantized, and stays on the device" in capsys.readouterr().err
    assert_same(step(base, ids), expected)


def test_a_file_cut_short_is_named(tiny_model, tmp_path, ids):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    model = loaded(folder, "disk").model
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2_000])
    with pytest.raises(ModelError, match=r"model.safetensors: ends at byte"):
        model.get_input_embeddings()(ids)
    with pytest.raises(ModelError, match=r"model.safetensors: ends at byte"):
        list(model.get_output_embeddings().table.chunks(48))


def test_a_wrong_shape_is_named_with_both_shapes(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(64, 64)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head.weight: shape \[64, 64\], the config asks for \[128, 64\]"):
        loaded(folder, "disk")


@pytest.mark.parametrize("outside", [-1, 128])
def test_an_id_without_a_row_is_refused(outside, tiny_model):
    embedding = loaded(tiny_model("llama"), "disk").model.get_input_embeddings()
    with pytest.raises(IndexError, match="has 128 embeddings"):
        embedding(torch.tensor([[3, outside]]))
