"""Tiled loss and its gradient against torch's own on whole logits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.adapters.lora import LoRABranch
from qlora_kit.adapters.tables import BranchedTable, TrainedTable
from qlora_kit.base.vocabulary import ResidentTable
from qlora_kit.data.tokenize import IGNORE_INDEX
from qlora_kit.profiling.simulated_device import simulated_device
from qlora_kit.training.loss import chunked_cross_entropy


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N=17, D=8], head [V=37, D], targets [N] with ignored ones."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 37, (17,), generator=generator)
    targets[[0, 5, 6, 16]] = IGNORE_INDEX
    hidden, head = (torch.randn(rows, 8, generator=generator, dtype=torch.float64).to(dtype) for rows in (17, 37))
    return hidden, head, targets


class PassingHead(ResidentTable):
    """A head that is not there between passes, which are counted; a chunk is gone when the next one is asked for."""

    is_resident, passes = False, 0

    def chunks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        self.passes += 1
        for start, chunk in super().chunks(rows):
            lent = chunk.clone()
            yield start, lent
            lent.fill_(torch.nan)


def reference(hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of hidden by torch's own cross entropy."""
    hidden = hidden.detach().requires_grad_()
    logits = hidden @ head.T if softcap is None else softcap * torch.tanh(hidden @ head.T / softcap)
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


def tiled(hidden: Tensor, head: Tensor | ResidentTable, targets: Tensor, *tile: int, softcap: float | None = None):
    """Loss and gradient of hidden by ours."""
    hidden = hidden.detach().requires_grad_()
    chunk = dict(zip(("chunk_tokens", "chunk_vocabulary"), tile))
    loss = chunked_cross_entropy(hidden, head, targets, **chunk, softcap=softcap)
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_vocabulary", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_equal_the_unchunked_reference(dtype, chunk_tokens, chunk_vocabulary, softcap):
    hidden, head, targets = problem(dtype)
    found = tiled(hidden, head, targets, chunk_tokens, chunk_vocabulary, softcap=softcap)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(found, reference(hidden, head, targets, softcap), rtol=tolerance, atol=tolerance)
    assert not found[1][targets == IGNORE_INDEX].any()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_gradient_is_that_of_the_loss(softcap):
    hidden, head, targets = problem(torch.float64)

    def scaled(hidden: Tensor) -> Tensor:
        return 0.3 * chunked_cross_entropy(hidden, head, targets, chunk_tokens=5, chunk_vocabulary=10, softcap=softcap)

    assert torch.autograd.gradcheck(scaled, hidden.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_head_that_is_fetched_passes_once_and_gives_the_same_bits(softcap, dtype):
    hidden, head, targets = problem(dtype)
    passing = PassingHead(head)
    expected = tiled(hidden, head, targets, 5, 10, softcap=softcap)
    assert all(torch.equal(a, b) for a, b in zip(tiled(hidden, passing, targets, 5, 10, softcap=softcap), expected))
    assert passing.passes == 1


def test_the_loss_without_a_gradient_is_the_same():
    hidden, head, targets = problem()
    expected, _ = tiled(hidden, head, targets, 5, 10, softcap=2.0)
    loss = chunked_cross_entropy(hidden, head, targets, chunk_tokens=5, chunk_vocabulary=10, softcap=2.0)
    assert torch.equal(loss, expected) and not loss.requires_grad


def test_ignored_positions_are_never_projected():
    hidden, head, targets = problem()
    expected = tiled(hidden, head, targets, 5, 10)
    found = tiled(hidden.masked_fill(targets[:, None] == IGNORE_INDEX, torch.nan), head, targets, 5, 10)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def chunked_over_tokens(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The gradient as this kit computed it before tiles: the softmax of all logits, rounded, times the whole head."""
    logits = F.linear(hidden, head).float()
    grad = logits.sub_(logits.logsumexp(dim=-1)[:, None]).exp_()
    grad.scatter_add_(1, targets[:, None], grad.new_full((len(grad), 1), -1.0))
    return grad.to(head.dtype) @ head


@pytest.mark.parametrize("margin", [0.0, 7.0, 14.0])  # p of the target: about 0.5, 0.997, 0.99999
def test_in_bfloat16_the_gradient_is_nearer_to_fp64_than_without_tiles(margin):
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(4000, 256, generator=generator) / 16
    targets = torch.randint(0, 4000, (64,), generator=generator)
    hidden, head = (head[targets] * (math.log(4000) + margin)).bfloat16(), head.bfloat16()
    logits = F.linear(hidden, head).double()  # rounded to bf16 by both
    exact = (logits.softmax(dim=-1) - F.one_hot(targets, 4000)) @ head.double()
    of_tiles = tiled(hidden, head, targets, 16, 1000)[1] - exact
    without = chunked_over_tokens(hidden, head, targets) - exact
    assert of_tiles.norm() < without.norm()
    assert of_tiles.norm() < 2**-9 * exact.norm()


def test_what_a_certain_target_misses_is_not_lost_to_cancellation():
    hidden, head = torch.tensor([[1.0, 0.0]]), torch.tensor([[40.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    loss, grad = tiled(hidden, head, torch.tensor([0]), 1, 2)
    others = torch.exp(head[1:, 0] - 40)  # their probabilities: in fp32 1 - p of the target is 0, in fp64 too
    expected = others @ head[1:] - others.sum() * head[0]
    torch.testing.assert_close((loss, grad), (others.sum(), expected[None]), rtol=1e-5, atol=0)


def test_nothing_learned_is_zero_with_zero_gradient():
    hidden, head, targets = problem()
    passing = PassingHead(head)
    loss, grad = tiled(hidden, passing, torch.full_like(targets, IGNORE_INDEX), 4, 10)
    assert loss.item() == 0.0
    assert not grad.any() and grad.shape == hidden.shape
    assert passing.passes == 0


@pytest.mark.parametrize("target", [-1, 37])
def test_a_target_outside_the_vocabulary_is_never_a_number(target):
    hidden, head, targets = problem()
    targets[3] = target
    assert chunked_cross_entropy(hidden, head, targets, chunk_tokens=4, chunk_vocabulary=10).isnan()


def test_different_lengths_are_refused():
    hidden, head, targets = problem()
    with pytest.raises(ValueError, match="17 hidden states, 16 targets"):
        chunked_cross_entropy(hidden, head, targets[1:], chunk_tokens=4)


def test_on_a_cpu_one_shape_serves_many_counts_of_learned_tokens(monkeypatch):
    shapes, project = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **out: shapes.add(tuple(a.shape)) or project(a, b, **out))
    hidden, head, _ = problem()
    hidden = hidden.repeat(4, 1)
    for learned in (33, 40, 64):
        targets = torch.full((68,), IGNORE_INDEX)
        targets[:learned] = torch.arange(learned) % 37
        found = tiled(hidden, head, targets, 1000, 1000)
        torch.testing.assert_close(found, reference(hidden, head, targets, None), rtol=2e-6, atol=2e-6)
    assert shapes == {(64, 8), (64, 37)}


# --------------------------------------------------------------------------------------------- a head that is trained


def head_gradients(trained: TrainedTable | BranchedTable) -> list[Tensor]:
    """Of a whole head, [V, D]; of a branch, of A and of B."""
    if isinstance(trained, TrainedTable):
        return [torch.cat([piece.grad for piece in trained.pieces if piece.grad is not None])]
    return [
        parameter.grad for parameter in (trained.branch.lora_A, trained.branch.lora_B) if parameter.grad is not None
    ]


def learnt(hidden: Tensor, trained: TrainedTable | BranchedTable, targets: Tensor, chunk: int, softcap: float | None):
    """Gradients of hidden and of the head by ours, the loss weighed by 0.3 and then by 0.7."""
    hidden = hidden.detach().requires_grad_()
    for share in (0.3, 0.7):
        loss = chunked_cross_entropy(hidden, trained, targets, chunk_tokens=chunk, chunk_vocabulary=5, softcap=softcap)
        (share * loss).backward()
    return [hidden.grad, *head_gradients(trained)]


def learnt_by_torch(hidden: Tensor, head: Tensor, branch: LoRABranch | None, targets: Tensor, softcap: float | None):
    """The same by torch's own cross entropy on whole logits."""
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    parameters = [head] if branch is None else [branch.lora_A, branch.lora_B]
    logits = hidden @ head.T
    if branch is not None:
        logits = logits + branch.scale * hidden @ branch.lora_A.T @ branch.lora_B.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return torch.autograd.grad(loss, [hidden, *parameters])


@pytest.mark.parametrize("with_branch", [False, True], ids=["whole", "branch"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 1000])
def test_gradients_of_a_trained_head_are_torchs(chunk_tokens, softcap, with_branch, monkeypatch):
    for module in ("adapters.tables", "training.loss"):
        monkeypatch.setattr(f"qlora_kit.{module}.TABLE_ROWS", 16)
    monkeypatch.setattr("qlora_kit.training.loss.LOSS_CHUNK_VOCABULARY", 48)  # three times as many tokens a tile
    hidden, head, targets = problem(torch.float64)
    branch = LoRABranch(torch.randn(3, 8).double(), torch.randn(37, 3).double(), scale=0.5) if with_branch else None
    trained = TrainedTable(head.clone()) if branch is None else BranchedTable(ResidentTable(head), branch)
    expected = learnt_by_torch(hidden, head, branch, targets, softcap)
    found = learnt(hidden, trained, targets, chunk_tokens, softcap)
    assert len(found) == len(expected) == 2 + with_branch
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)


def test_the_gradient_of_a_bf16_head_is_as_exact_as_torchs_on_whole_logits():
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(rows, 32, generator=generator).bfloat16() for rows in (512, 100))
    targets = torch.randint(0, 100, (512,), generator=generator)
    exact = learnt_by_torch(hidden.double(), head.double(), None, targets, None)[1]
    trained = TrainedTable(head.clone())
    chunked_cross_entropy(hidden, trained, targets, chunk_tokens=64).backward()
    (found,) = head_gradients(trained)
    assert found.dtype == torch.bfloat16
    theirs = learnt_by_torch(hidden, head, None, targets, None)[1]
    assert (found.double() - exact).norm() < 1.05 * (theirs.double() - exact).norm()


def test_nothing_as_tall_as_the_vocabulary_is_made_for_a_trained_head():
    hidden, targets = torch.randn(64, 16, requires_grad=True), torch.zeros(64, dtype=torch.long)
    with simulated_device() as device:
        trained = TrainedTable(torch.randn(60_000, 16).to("simgpu"))
        trained.gradient(0, 1)
        given = hidden.detach().to("simgpu").requires_grad_(), trained, targets.to("simgpu")
        before = device.live_bytes
        device.reset_peak()
        chunked_cross_entropy(*given, chunk_tokens=8).backward()
        peak = device.peak_bytes - before
    assert peak < 8 * 16384 * 4 + 64 * 16 * 4 * 20 < 60_000 * 16 * 4  # a tile, some hidden states; the table is more
