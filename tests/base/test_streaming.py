"""Streamed blocks give the results of resident ones, bit for bit; what cannot be read is an error."""

from __future__ import annotations

import contextlib
import gc
import shutil
import threading
from pathlib import Path

import pytest
import torch

from qlora_kit.adapters.inject import branches, inject, trainable_parameters
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import Base, load_base
from qlora_kit.base.quantize_model import quantize_model
from qlora_kit.base.streaming import Placement, spread
from qlora_kit.errors import ModelError
from qlora_kit.planning.components import blocks_of_a_slab
from qlora_kit.profiling.simulated_device import simulated_device
from qlora_kit.recipe import Adapter, Model
from qlora_kit.training.blocks import attach

LAYERS = 4


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """`checkpoint("llama")` -> folder of a 4-bit checkpoint of four blocks."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            layers = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
            made[model_type] = tmp_path_factory.mktemp("nf4") / model_type
            quantize_model(tiny_model(model_type, **{layers: LAYERS}), made[model_type])
        return made[model_type]

    return make


def run(
    folder: Path, ids: torch.Tensor, tier: str, resident: int = 0, device: str = "cpu", host: int = 0, **model: str
) -> list:
    """Losses of two steps, the gradients of the second, and logits without gradient."""
    base = load_base(Model(path=str(folder), **model), device, Placement(tier, resident, host=host))
    seed = inject(base, Adapter(rank=4, dropout=0.2), seed=0)
    for branch in branches(base).values():
        branch.lora_B.data.copy_(
            torch.randn(branch.lora_B.shape, generator=torch.Generator().manual_seed(branch.index))
        )
        branch.train()
    attach(base)
    ids, found = ids.to(device), []
    for step in range(2):
        seed.key = (0, step, 0)
        loss = base.model(input_ids=ids, use_cache=False).logits.float().square().mean()
        base.model.zero_grad()
        loss.backward()
        found.append(loss.detach().cpu())
    with torch.no_grad():
        found.append(base.model.eval()(input_ids=ids, use_cache=False).logits.cpu())
    return found + [parameter.grad.cpu() for _, parameter in trainable_parameters(base)]


def assert_same(one: list, other: list) -> None:
    assert len(one) == len(other) > 3
    assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_streamed_gradients_are_bit_identical_to_resident_ones(model_type, tier, checkpoint, ids):
    assert_same(run(checkpoint(model_type), ids, tier), run(checkpoint(model_type), ids, "device"))


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("resident", [1, 2, 3])
def test_some_blocks_resident_and_others_streamed_change_nothing(tier, resident, checkpoint, ids):
    assert_same(run(checkpoint("llama"), ids, tier, resident), run(checkpoint("llama"), ids, "device"))


@pytest.mark.parametrize("device", ["cpu", "simgpu"])
@pytest.mark.parametrize(("resident", "host"), [(0, 2), (1, 1), (1, 2), (2, 9)])
def test_blocks_on_device_host_and_disk_at_once_change_nothing(resident, host, device, checkpoint, ids):
    expected = run(checkpoint("llama"), ids, "device")
    with simulated_device() if device == "simgpu" else contextlib.nullcontext():
        assert_same(run(checkpoint("llama"), ids, "disk", resident, device, host), expected)


def test_pinned_memory_of_blocks_is_nearly_all_used():
    block = 428 << 20  # torch would round each to 512 MiB
    left, taken = 80, 0
    while left:
        count = blocks_of_a_slab(block, left)
        taken, left = taken + (1 << (count * block - 1).bit_length()), left - count
    assert 80 * block <= taken < 1.08 * 80 * block
    assert blocks_of_a_slab(1 << 40, 3) == 1


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_an_unquantized_base_streams_too(tier, tiny_model, ids):
    folder = tiny_model("llama", torch.bfloat16, num_hidden_layers=LAYERS)
    assert_same(run(folder, ids, tier, quantization="none"), run(folder, ids, "device", quantization="none"))


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_streaming_on_a_device_with_late_copies_gives_the_cpus_gradients(model_type, tier, checkpoint, ids):
    expected = run(checkpoint(model_type), ids, "device")
    with simulated_device() as device:
        found = run(checkpoint(model_type), ids, tier, device="simgpu")
        assert device.peak_bytes > 0
    assert_same(found, expected)


def test_device_memory_does_not_grow_with_depth(tiny_model, tmp_path, ids):
    peaks = []
    for layers in (4, 8, 16):
        folder = tmp_path / str(layers)
        quantize_model(tiny_model("llama", num_hidden_layers=layers), folder)
        with simulated_device() as device:
            base = load_base(Model(path=str(folder)), "simgpu", Placement("host"))
            attach(base)
            device.reset_peak()
            with torch.no_grad():
                base.model(input_ids=ids.to("simgpu"), use_cache=False)
            norms_and_offsets = layers * (2 * 512 + 7 * 512)  # what stays of a block, in allocations of 512 bytes
            peaks.append(device.peak_bytes - norms_and_offsets)
            del base
    assert max(peaks) - min(peaks) <= 4096


def away(base: Base) -> set[int]:
    return {i for i, block in enumerate(base.blocks()) if any(buffer.is_meta for buffer in block.buffers())}


def test_released_blocks_leave_nothing_behind(checkpoint):
    base = load_base(Model(path=str(checkpoint("llama"))), "cpu", Placement("disk", 1))
    assert away(base) == {1, 2, 3}
    with base.streamer.block(2, 3):
        assert away(base) == {1, 3}
    assert away(base) == {1, 2, 3}


def test_a_base_that_is_let_go_ends_its_reader_thread(checkpoint):
    before = set(threading.enumerate())
    base = load_base(Model(path=str(checkpoint("llama"))), "cpu", Placement("disk"))
    (reader,) = set(threading.enumerate()) - before
    del base
    gc.collect()
    reader.join(timeout=10)
    assert not reader.is_alive()


def test_a_file_cut_short_while_streaming_is_named(checkpoint, tmp_path, ids):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "m")
    base = load_base(Model(path=str(folder)), "cpu", Placement("disk"))
    attach(base)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(ModelError, match=r"model.safetensors: ends at byte"), torch.no_grad():
        base.model(input_ids=ids, use_cache=False)


@pytest.mark.parametrize(("resident", "total"), [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4), (5, 32), (31, 32)])
def test_resident_blocks_are_as_many_as_asked(resident, total):
    chosen = spread(resident, total)
    assert len(chosen) == resident
    assert chosen <= set(range(total))
