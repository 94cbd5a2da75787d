"""Each formula of the ledger against closed forms, bitsandbytes' tensors and what the loss allocates."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_kit.adapters.inject import inject, trainable_parameters
from qlora_kit.architecture_parts import LinearShape
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import load_base
from qlora_kit.base.streaming import Placement
from qlora_kit.base.vocabulary import ResidentTable
from qlora_kit.optimizers import OPTIMIZERS
from qlora_kit.planning import components as ledger
from qlora_kit.planning.moments import total, training_moments
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config
from qlora_kit.profiling.simulated_device import simulated_device
from qlora_kit.recipe import Recipe, recipe_for_model
from qlora_kit.training.blocks import attach
from qlora_kit.training.loss import batch_losses, chunked_cross_entropy
from qlora_kit.training.optim import build_optimizer, optimizer_state


def shapes_of(name: str) -> ModelShapes:
    return model_shapes(*read_config(name))


def recipe_with(*overrides: str) -> Recipe:
    return recipe_for_model("llama-7b", overrides)


def one_linear(out_features: int, in_features: int) -> ModelShapes:
    """LLaMA-7B with one block of one linear."""
    values = vars(shapes_of("llama-7b")) | {"layers": 1}
    names = ("source", "architecture", "hidden", "heads", "layers", "vocabulary", "tied", "softcap")
    kept = {name: values[name] for name in names}
    linear = LinearShape("self_attn.q_proj", out_features, in_features)
    return ModelShapes(**kept, linears=(linear,), block_tensors=(), outer_tensors=())


# -------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("rank", "parameters"), [(16, 131_072), (8, 65_536), (4, 32_768)])
def test_a_branch_beside_4096_x_4096_has_rank_times_8192_parameters(rank: int, parameters: int) -> None:
    assert ledger.trainable_parameters(one_linear(4096, 4096), recipe_with(f"adapter.rank={rank}")) == parameters


def test_llama_7b_rank_8_on_q_and_v_trains_4194304() -> None:
    recipe = recipe_with("adapter.rank=8", "adapter.target_modules=[q_proj, v_proj]")
    assert ledger.trainable_parameters(shapes_of("llama-7b"), recipe) == 4_194_304
    assert ledger.adapter(shapes_of("llama-7b"), recipe) == 2 * 4_194_304


def test_llama_7b_rank_16_on_attention_trains_16777216() -> None:
    recipe = recipe_with("adapter.target_modules=[q_proj, k_proj, v_proj, o_proj]")
    assert ledger.trainable_parameters(shapes_of("llama-7b"), recipe) == 16_777_216


def test_nf4_with_double_quantization_takes_4_127_bits_a_weight() -> None:
    shapes, recipe = one_linear(4096, 4096), recipe_with()
    size_bytes = ledger.base_nf4(shapes, recipe) + ledger.quant_constants(shapes, recipe)
    assert 8 * size_bytes / 4096**2 == pytest.approx(4.127, abs=5e-4)


def test_without_quantization_every_parameter_is_in_base_unquantized() -> None:
    shapes, recipe = shapes_of("llama-7b"), recipe_with("model.quantization=none")
    assert ledger.base_unquantized(shapes, recipe) == 2 * shapes.total_parameters
    assert ledger.base_nf4(shapes, recipe) == ledger.quant_constants(shapes, recipe) == 0
    assert ledger.workspace(shapes, recipe) == 0


def test_a_tied_head_is_counted_once() -> None:
    shapes, recipe = shapes_of("smollm2-135m"), recipe_with()
    norms = 576 * (2 * 30 + 1)
    assert ledger.base_unquantized(shapes, recipe) == 2 * (49152 * 576 + norms)


def test_linear_biases_stay_unquantized() -> None:
    with_bias, without = shapes_of("qwen2.5-0.5b"), shapes_of("qwen2.5-0.5b").other_parameters
    assert sum(linear.out_features for linear in with_bias.linears if linear.bias) == 896 + 2 * 128
    assert without == 151936 * 896 + 24 * (2 * 896 + 896 + 2 * 128) + 896


@pytest.mark.parametrize(("setting", "chunk"), [("auto", 512), ("full", 4096), ("100", 100), ("9999", 4096)])
def test_the_loss_chunk_is_decided_here(setting: str, chunk: int) -> None:
    recipe = recipe_with(f"memory.loss_chunk_tokens={setting}", "data.seq_len=2048", "train.micro_batch=2")
    assert ledger.loss_chunk_tokens(recipe) == chunk


# -------------------------------------------------------------------------------- against bitsandbytes' tensors


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 64), (96, 56), (7, 9), (1000, 300), (1, 1)])
def test_quantized_bytes_equal_bitsandbytes(
    quantization: str, double_quant: bool, out_features: int, in_features: int
) -> None:
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(out_features, in_features)
    codes, state = quantize_4bit(weight, compress_statistics=double_quant, quant_type=quantization)
    constants = [state.absmax, state.state2.absmax, state.offset] if double_quant else [state.absmax]
    shapes = one_linear(out_features, in_features)
    recipe = recipe_with(f"model.quantization={quantization}", f"model.double_quant={double_quant}")
    assert ledger.base_nf4(shapes, recipe) == codes.nbytes
    assert ledger.quant_constants(shapes, recipe) == sum(constant.nbytes for constant in constants)


@pytest.mark.parametrize("master_weights", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_bytes_are_those_of_its_state(name: str, dtype: str, master_weights: bool) -> None:
    overrides = (f"train.optimizer={name}", f"train.master_weights={master_weights}", f"adapter.dtype={dtype}")
    shapes, recipe = one_linear(300, 250), recipe_with(*overrides)  # A 4000 values, B 4800
    sizes = {"A": 16 * 250, "B": 16 * 300}
    parameters = {
        key: torch.nn.Parameter(torch.zeros(size, dtype=getattr(torch, dtype))) for key, size in sizes.items()
    }
    kept = recipe.keeps_master_weights
    optimizer = build_optimizer(recipe.train, parameters, torch.device("cpu"), master_weights=kept)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors, _ = optimizer_state(optimizer, parameters)
    assert ledger.optimizer(shapes, recipe) == sum(tensor.nbytes for tensor in tensors.values() if tensor.dim())


def test_a_master_weight_costs_two_bytes_a_trained_parameter() -> None:
    shapes = shapes_of("llama-7b")
    on, off = (ledger.optimizer(shapes, recipe_with(f"train.master_weights={kept}")) for kept in (True, False))
    assert on - off == 2 * ledger.trainable_parameters(shapes, recipe_with())


# ---------------------------------------------------------------------------------- against what is loaded


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_static_bytes_of_a_loaded_base_and_adapter_are_those_of_the_plan(
    tiny_model: Callable[..., Path], model_type: str, quantization: str
) -> None:
    recipe = recipe_for_model(str(tiny_model(model_type)), [f"model.quantization={quantization}"])
    shapes = model_shapes(*read_config(recipe.model.path))
    base = load_base(recipe.model)
    computed = ("inv_freq", "embed_scale")  # constants of the architecture, a few bytes
    stored = [buffer for name, buffer in base.model.named_buffers() if not name.endswith(computed)]
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in (*base.model.parameters(), *stored)}
    formulas = (ledger.base_nf4, ledger.quant_constants, ledger.base_unquantized)
    assert sum(sizes.values()) == sum(formula(shapes, recipe) for formula in formulas)
    inject(base, recipe.adapter, seed=0)
    assert sum(p.nbytes for _, p in trainable_parameters(base)) == ledger.adapter(shapes, recipe)


# ------------------------------------------------------------------------------- against what the loss allocates


def peak_bytes_of(call: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held at once during the call, beside what was there before."""
    gc.collect()  # what an earlier test left would be freed during the call, and be taken off
    with torch.profiler.profile(profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("name", ["llama-7b", "gemma-2-2b"])  # the second caps its logits
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_take_what_the_loss_allocates(dtype: str, name: str, with_gradient: bool) -> None:
    shapes = dataclasses.replace(shapes_of(name), vocabulary=40_000)
    recipe = recipe_with(f"model.dtype={dtype}", "memory.loss_chunk_tokens=64")
    hidden, head = torch.zeros(128, 8, dtype=getattr(torch, dtype)), torch.zeros(40_000, 8, dtype=getattr(torch, dtype))
    with simulated_device() as device:
        given = (
            hidden.to("simgpu").requires_grad_(with_gradient),
            head.to("simgpu"),
            torch.zeros(128).long().to("simgpu"),
        )
        before = device.live_bytes
        device.reset_peak()
        chunked_cross_entropy(*given, chunk_tokens=64, softcap=shapes.softcap)
        peak = device.peak_bytes - before
    assert ledger.logits(shapes, recipe, with_gradient) == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("embeddings", ["device", "disk"])
def test_beside_the_logits_the_loss_takes_what_is_planned(dtype: str, embeddings: str) -> None:
    shapes = dataclasses.replace(shapes_of("llama-7b"), vocabulary=256, hidden=2048)
    settings = (f"model.dtype={dtype}", "memory.loss_chunk_tokens=64", f"memory.embeddings={embeddings}")
    recipe = recipe_with(*settings, "data.seq_len=512")
    hidden, head = (torch.zeros(rows, 2048, dtype=getattr(torch, dtype)) for rows in (512, 256))
    hidden.requires_grad_()
    resident = ResidentTable(head)
    resident.is_resident = embeddings == "device"  # else it passes once, for all tokens
    targets = torch.zeros(512, dtype=torch.long)
    peak = peak_bytes_of(lambda: chunked_cross_entropy(hidden, resident, targets, chunk_tokens=64))
    of_the_norm = 512 * 2048 * (4 + hidden.element_size())  # its fp32 copy and its output
    planned = ledger.around_head(shapes, recipe) - of_the_norm + ledger.logits(shapes, recipe)
    assert planned == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("vocab_size", [20_000, 40_000])  # two chunks, three
@pytest.mark.parametrize("embeddings", ["host", "disk"])
def test_a_pass_over_a_fetched_head_takes_the_planned_slots(
    tiny_model: Callable[..., Path], embeddings: str, vocab_size: int
) -> None:
    folder = tiny_model("llama", torch.bfloat16, vocab_size=vocab_size)
    recipe = recipe_for_model(str(folder), [f"memory.embeddings={embeddings}"])
    with simulated_device() as device:
        base = load_base(recipe.model, "simgpu", Placement(embeddings=embeddings))
        before = device.live_bytes
        device.reset_peak()
        for _ in base.model.get_output_embeddings().table.chunks(ledger.LOSS_CHUNK_VOCABULARY):
            pass
        peak = device.peak_bytes - before
    assert peak == ledger.head_slots(model_shapes(*read_config(str(folder))), recipe)


def test_a_smaller_chunk_of_tokens_is_a_smaller_tile_and_the_vocabulary_is_bounded() -> None:
    shapes, chunk = shapes_of("gemma-2-2b"), recipe_with("memory.loss_chunk_tokens=64")
    assert ledger.logits(shapes, chunk) < ledger.logits(shapes, recipe_with("memory.loss_chunk_tokens=128"))
    assert ledger.logits(shapes, chunk) == ledger.logits(dataclasses.replace(shapes, vocabulary=1 << 20), chunk)


STEP = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("vocab_size", [128, 8000])  # the peak lies in a block, in the loss
def test_forward_and_backward_of_llama_take_what_is_planned_within_5_percent(
    tiny_model: Callable[..., Path], vocab_size: int, checkpointing: bool
) -> None:
    folder = tiny_model("llama", torch.bfloat16, **STEP, vocab_size=vocab_size, max_position_embeddings=512)
    settings = ("data.seq_len=512", "data.packing=false", f"memory.gradient_checkpointing={checkpointing}")
    recipe = recipe_for_model(str(folder), settings)
    base = load_base(recipe.model)
    inject(base, recipe.adapter, seed=0)
    attach(base, checkpointing)
    ids, positions = torch.ones(1, 512, dtype=torch.long), torch.arange(512)[None]
    batch = SimpleNamespace(input_ids=ids, position_ids=positions, targets=ids)
    measured = peak_bytes_of(
        lambda: [batch_losses(base, [batch], 512)[0].backward() for _ in range(2)]
    )  # gradients stay
    static = ("base_nf4", "quant_constants", "base_unquantized", "adapter", "optimizer")
    moments = training_moments(model_shapes(*read_config(str(folder))), recipe, 0).values()
    planned = max(total({**moment, **dict.fromkeys(static, 0)}) for moment in moments)
    assert planned == pytest.approx(measured, rel=0.05)
