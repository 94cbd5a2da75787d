"""The product of a frozen linear and its branches, and its gradients, against plain autograd."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.adapters.lora import LoRABranch
from qlora_kit.base.linear import Dropout, FrozenLinear


def linear(quantization: str = "none", dtype: torch.dtype = torch.float64, bias: bool = True) -> FrozenLinear:
    generator = torch.Generator().manual_seed(0)
    made = FrozenLinear(64, 48, bias=bias, quantization=quantization, double_quant=True, dtype=dtype)
    made.store(torch.randn(48, 64, generator=generator, dtype=torch.float64).to(dtype) / 8)
    if bias:
        made.bias = torch.randn(48, generator=generator, dtype=torch.float64).to(dtype)
    return made


def with_branch(made: FrozenLinear, dropout: float = 0.0, rank: int = 4, name: str = "a") -> FrozenLinear:
    generator = torch.Generator().manual_seed(rank)
    A, B = (torch.randn(s, generator=generator, dtype=torch.float64).to(made.dtype) for s in ((rank, 64), (48, rank)))
    made.branches[name] = LoRABranch(A, B, scale=0.5, dropout_probability=dropout)
    made.active = (*made.active, name)
    return made


def inputs(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (
        torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_pass_gradcheck_in_fp64(dropout):
    made = with_branch(linear(), dropout)
    branch = made.branches["a"]

    def product(x, A, B):
        return torch.func.functional_call(made, {"branches.a.lora_A": A, "branches.a.lora_B": B}, (x,))

    with torch.no_grad():
        arguments = (inputs(), branch.lora_A.detach().clone(), branch.lora_B.detach().clone())
    assert torch.autograd.gradcheck(product, [argument.requires_grad_() for argument in arguments])


def test_product_equals_the_written_formula():
    made, x = with_branch(linear()), inputs()
    A, B = made.branches["a"].lora_A, made.branches["a"].lora_B
    torch.testing.assert_close(made(x), x @ made.dense.T + made.bias + 0.5 * (x @ A.T) @ B.T)


def test_several_adapters_add_up():
    both = with_branch(with_branch(linear(), name="a"), name="b", rank=3)
    first, second = with_branch(linear(), name="a"), with_branch(linear(), name="b", rank=3)
    x = inputs()
    torch.testing.assert_close(both(x), first(x) + second(x) - linear()(x))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_zero_B_leaves_the_output_bit_identical(quantization):
    plain, made = (linear(quantization, torch.bfloat16) for _ in range(2))
    with_branch(made).branches["a"].lora_B.data.zero_()
    assert torch.equal(made(inputs(torch.bfloat16)), plain(inputs(torch.bfloat16)))


def test_gradient_after_an_evaluation_equals_the_one_before():
    made, gradients = with_branch(linear("nf4", torch.bfloat16)), []
    for _ in range(2):
        x = inputs(torch.bfloat16)
        made.train()(x).square().sum().backward()
        gradients.append(x.grad)
        with torch.no_grad():
            made.eval()(inputs(torch.bfloat16))
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_a_linear_without_branch_keeps_nothing_for_backward():
    output = linear("nf4", torch.bfloat16)(inputs(torch.bfloat16))
    assert output.grad_fn.saved_tensors == ()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_merge_then_unmerge_restores_every_bit(quantization):
    made, x = with_branch(linear(quantization, torch.bfloat16)), inputs(torch.bfloat16)
    before, stored = made(x), [getattr(made, name).clone() for name in made.stored]
    made.merge()
    assert not torch.equal(made.weight(), made.base_weight())
    made.unmerge()
    assert torch.equal(made(x), before)
    assert all(torch.equal(getattr(made, name), value) for name, value in zip(made.stored, stored, strict=True))


def test_merged_product_equals_the_branch_in_fp32():
    made, x = with_branch(linear(dtype=torch.float32)), inputs(torch.float32)
    before = made(x)
    made.merge()
    torch.testing.assert_close(made(x), before)


def test_dropout_is_a_function_of_its_seed():
    x = torch.ones(1000)
    assert torch.equal(Dropout(0.25, 5)(x), Dropout(0.25, 5)(x))
    assert not torch.equal(Dropout(0.25, 5)(x), Dropout(0.25, 6)(x))
    assert 0.9 < Dropout(0.25, 5)(x).mean() < 1.1
