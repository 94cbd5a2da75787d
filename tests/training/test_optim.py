"""bf16 adapters with master weights follow fp32 ones bit for bit, whatever the optimizer; without, they stand still."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qlora_kit.optimizers import OPTIMIZERS
from qlora_kit.profiling.simulated_device import simulated_device
from qlora_kit.recipe import Train
from qlora_kit.training.optim import (
    build_optimizer,
    join,
    optimizer_state,
    restore_optimizer_state,
    split,
)

CPU = torch.device("cpu")
SHAPES = {"A": (16, 300), "B": (7, 16)}  # in 8-bit state, and below its minimum

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


class Trial:
    """Two parameters near 1, and an optimizer whose updates of 1e-4 are below half a bf16 step there."""

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device = CPU, *, master_weights: bool) -> None:
        self.device, self.parameters = device, {}
        for key, shape in SHAPES.items():
            start = 1.25 + torch.rand(shape, generator=torch.Generator().manual_seed(0)) / 2
            self.parameters[key] = nn.Parameter(start.bfloat16().to(device, dtype))
        self.start = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}
        settings = Train(optimizer=name, lr=1e-4, weight_decay=0.1)
        self.optimizer = build_optimizer(settings, self.parameters, device, master_weights=master_weights)

    def step(self, *numbers: int) -> None:
        """Steps with the bf16 gradients of these numbers."""
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for parameter in self.parameters.values():
                gradient = (1 + torch.rand(parameter.shape, generator=generator)).bfloat16()
                parameter.grad = gradient.to(self.device, parameter.dtype)
            self.optimizer.step()

    def master(self, key: str) -> Tensor:
        parameter = self.parameters[key]
        return join(parameter.detach(), self.optimizer.state[parameter]["master_lower"])

    def moved(self, key: str) -> Tensor:
        return self.parameters[key] != self.start[key]


# ------------------------------------------------------------------------------------------------ the two halves


def bit_patterns() -> Tensor:
    """Every upper half with the lower halves at which something changes, and random ones; as fp32."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    random = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=torch.Generator().manual_seed(0))
    return torch.cat([(upper[:, None] + lower).flatten(), random.to(torch.int32)]).view(torch.float32)


def test_joining_what_was_split_gives_back_every_bit() -> None:
    patterns = bit_patterns()
    assert torch.equal(join(*split(patterns)).view(torch.int32), patterns.view(torch.int32))


def test_the_upper_half_is_the_nearest_bf16() -> None:
    patterns = bit_patterns()
    finite = patterns[patterns.isfinite()]
    tie = finite.view(torch.int32) & 0xFFFF == 0x8000
    upper, nearest = split(finite)[0], finite.bfloat16()
    assert torch.equal(upper[~tie], nearest[~tie])
    away = (finite[tie].view(torch.int32) + 0x8000).view(torch.float32)
    assert torch.equal(upper[tie].float(), away)


# ------------------------------------------------------------------------------------------------ the optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bf16_adapter_follows_the_fp32_one_bit_for_bit(name: str) -> None:
    ours = Trial(name, torch.bfloat16, master_weights=True)
    reference = Trial(name, torch.float32, master_weights=False)
    for number in range(60):
        ours.step(number)
        reference.step(number)
    for key, parameter in reference.parameters.items():
        assert torch.equal(ours.master(key), parameter)
        assert torch.equal(ours.parameters[key], split(parameter.detach())[0])
        assert ours.moved(key).float().mean() > 0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_master_weights_the_same_updates_are_lost(name: str) -> None:
    plain = Trial(name, torch.bfloat16, master_weights=False)
    plain.step(*range(60))
    assert not any(plain.moved(key).any() for key in SHAPES)


def continued(stopped: Trial, name: str) -> Trial:
    """A fresh trial that goes on where another one stopped."""
    trial = Trial(name, torch.bfloat16, master_weights=True)
    tensors, numbers = optimizer_state(stopped.optimizer, stopped.parameters)
    copies = {key: value.clone() for key, value in tensors.items()}
    for key, parameter in stopped.parameters.items():
        trial.parameters[key].data.copy_(parameter.data)
    restore_optimizer_state(trial.optimizer, trial.parameters, copies, numbers)
    return trial


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_state_goes_on_as_if_nothing_had_stopped(name: str) -> None:
    whole, stopped = (Trial(name, torch.bfloat16, master_weights=True) for _ in range(2))
    whole.step(*range(8))
    stopped.step(*range(5))
    resumed, forgetful = continued(stopped, name), continued(stopped, name)
    for parameter in forgetful.parameters.values():
        forgetful.optimizer.state[parameter]["master_lower"].zero_()
    for trial in (resumed, forgetful):
        trial.step(*range(5, 8))
    for key in SHAPES:
        assert torch.equal(resumed.master(key), whole.master(key))
        assert not torch.equal(forgetful.master(key), whole.master(key))


def test_the_rate_is_that_of_the_loops_groups_and_a_parameter_without_gradient_rests() -> None:
    trial = Trial("adamw", torch.bfloat16, master_weights=True)
    trial.step(0)
    before = {key: trial.master(key) for key in SHAPES}
    trial.optimizer.param_groups[0]["lr"] = 0.0
    trial.step(1)
    assert all(torch.equal(trial.master(key), before[key]) for key in SHAPES)
    trial.optimizer.param_groups[0]["lr"] = 1e-2
    trial.optimizer.zero_grad(set_to_none=True)
    trial.optimizer.step()
    assert all(torch.equal(trial.master(key), before[key]) for key in SHAPES)


# ------------------------------------------------------------------------------------------------ a device


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_device_computes_what_the_cpu_does(name: str) -> None:
    expected = Trial(name, torch.bfloat16, master_weights=True)
    expected.step(0, 1, 2)
    with simulated_device():
        found = Trial(name, torch.bfloat16, torch.device("simgpu"), master_weights=True)
        found.step(0, 1, 2)
        assert all(torch.equal(found.master(key).cpu(), expected.master(key)) for key in SHAPES)


def test_one_parameter_is_in_fp32_at_a_time() -> None:
    count, size = 32, 1 << 14
    with simulated_device() as device:
        where = torch.device("simgpu")
        parameters = {
            str(index): nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device=where)) for index in range(count)
        }
        optimizer = build_optimizer(Train(optimizer="adamw"), parameters, where, master_weights=True)
        for _ in range(2):
            for parameter in parameters.values():
                parameter.grad = torch.ones_like(parameter)
            before = device.live_bytes
            device.reset_peak()
            optimizer.step()
        assert device.live_bytes == before
        assert device.peak_bytes - before <= count * size  # values and gradients of all at once would be 8 times this
