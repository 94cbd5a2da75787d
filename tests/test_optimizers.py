"""Claims about OPTIMIZERS, for every row: it trains on a CPU, its state is as large as it says, unpaged is the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qlora_kit.optimizers import EIGHT_BIT_BLOCK, EIGHT_BIT_MINIMUM, OPTIMIZERS

TABLES = ("qmap1", "qmap2", "step")  # constants of the 8-bit code, and torch's counter
PAGED = [name for name, row in OPTIMIZERS.items() if row.unpaged]

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def stepped(name: str, shape: tuple[int, ...] = (64, 128), *, lr: float = 0.01, steps: int = 3) -> tuple[Tensor, int]:
    """The parameter after some steps with one gradient, and the bytes of the optimizer's state."""
    parameter = nn.Parameter(torch.linspace(-1, 1, 64 * 128)[: torch.Size(shape).numel()].reshape(shape).clone())
    optimizer = OPTIMIZERS[name].build([parameter], lr=lr, weight_decay=0.1)
    for _ in range(steps):
        parameter.grad = torch.cos(9 * parameter.detach())
        optimizer.step()
    state = [value for key, value in optimizer.state[parameter].items() if key not in TABLES]
    return parameter.detach(), sum(value.numel() * value.element_size() for value in state if isinstance(value, Tensor))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_changes_every_value_that_has_a_gradient(name: str) -> None:
    before, _ = stepped(name, lr=0.0)
    after, _ = stepped(name, steps=1)
    assert torch.isfinite(after).all()
    assert (after != before).float().mean() > 0.999


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(64, 128), (3, 1371), (16, 256), (7,), (1, EIGHT_BIT_MINIMUM - 1)])
def test_the_state_takes_the_bytes_that_the_row_says(name: str, shape: tuple[int, ...]) -> None:
    _, state_bytes = stepped(name, shape, steps=1)
    assert state_bytes == OPTIMIZERS[name].state_bytes(torch.Size(shape).numel())


def test_state_bytes_are_the_published_figures_per_value() -> None:
    assert OPTIMIZERS["adamw"].state_bytes(1 << 20) == 8 << 20
    assert OPTIMIZERS["paged_adamw_8bit"].state_bytes(1 << 20) == (2 << 20) + 8 * (1 << 20) // EIGHT_BIT_BLOCK


@pytest.mark.parametrize("name", PAGED)
def test_the_unpaged_kin_is_an_unpaged_row_with_the_same_result(name: str) -> None:
    kin = OPTIMIZERS[name].unpaged
    assert kin is not None
    assert OPTIMIZERS[kin].unpaged is None
    assert torch.equal(stepped(name)[0], stepped(kin)[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_row_follows_adamw(name: str) -> None:
    reference = stepped("adamw")[0]
    tolerance = 1e-6 if OPTIMIZERS[name].state_bits == 32 else 2e-3
    assert (stepped(name)[0] - reference).abs().max() < tolerance


def test_the_names_of_the_contract_are_rows() -> None:
    assert {"paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw"} <= set(OPTIMIZERS)
