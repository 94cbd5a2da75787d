"""An unfilled base is the one that the loader makes, but for what its memory holds."""

from __future__ import annotations

import psutil
import pytest
import torch

from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import load_base
from qlora_kit.base.quantize_model import quantize_model
from qlora_kit.base.streaming import Placement
from qlora_kit.profiling.simulated_device import simulated_device
from qlora_kit.profiling.unfilled import unfilled_base
from qlora_kit.recipe import Model
from qlora_kit.training.blocks import attach

PLACEMENTS = [
    Placement(),
    Placement("host", 1, "host"),
    Placement("disk", 1, "disk", 1),
]


def tensors(base) -> dict[str, tuple[torch.Size, torch.dtype, str]]:
    named = (*base.model.named_parameters(), *base.model.named_buffers())
    return {name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in named}


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.tier)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_tensors_device_and_host_bytes_are_those_of_a_loaded_base(model_type, placement, tiny_model, tmp_path):
    layers = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    quantize_model(tiny_model(model_type, torch.bfloat16, **{layers: 4}), tmp_path / "m", dtype="bfloat16")
    found = []
    for make in (load_base, unfilled_base):
        with simulated_device() as device:
            base = make(Model(path=str(tmp_path / "m")), "simgpu", placement)
            torch.accelerator.synchronize()
            found.append((tensors(base), device.live_bytes, device.pinned_bytes, base.streamer is None))
            del base
    assert found[0] == found[1]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_can_be_built_and_run(model_type, tiny_model, ids):
    with simulated_device(shapes_only=True):
        base = unfilled_base(Model(path=str(tiny_model(model_type))), "simgpu", Placement("disk", 1, "disk"))
        attach(base)
        assert base.model(input_ids=ids.to("simgpu"), use_cache=False).logits.shape == (*ids.shape, 128)


def test_forty_gigabytes_of_blocks_on_the_host_take_none():
    before = psutil.Process().memory_info().rss
    with simulated_device(shapes_only=True) as device:
        base = unfilled_base(Model(path="llama-3-70b"), "simgpu", Placement("host", 0, "host"))
        assert device.pinned_bytes > 36 << 30
        assert device.live_bytes < 1 << 30
        assert psutil.Process().memory_info().rss - before < 512 << 20
        del base
