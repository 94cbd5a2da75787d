"""What a block keeps, against what torch saves; what switches make of it, against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.planning import activations
from qlora_kit.planning.quantities import hidden_state
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config
from qlora_kit.recipe import Recipe, recipe_for_model

SMALL = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 8}
SMALL |= {"vocab_size": 99, "intermediate_size": 640, "head_dim": 16, "pad_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 256, "n_layer": 1, "n_head": 16, "vocab_size": 99, "attn_pdrop": 0, "resid_pdrop": 0},
    "gpt_neox": {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")},
}


def shapes_of(name: str) -> ModelShapes:
    return model_shapes(*read_config(name))


def recipe_with(*overrides: str) -> Recipe:
    return recipe_for_model("llama-7b", overrides)


def bytes_kept_of_a_block(model_type: str, settings: dict[str, Any], seq_len: int, documents: int) -> int:
    """Bytes of the storages that autograd saves in one block's forward; parameters and the block's input not counted.

    The linears' weights are trainable here, so that each linear keeps its input, as a linear with a branch does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    row = ARCHITECTURES[model_type]
    kind = "eager" if row.eager_attention else "sdpa"
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=kind)
    model.requires_grad_(False)
    block = model.get_submodule(row.blocks)[0]
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name.endswith(".weight") and parameter.dim() == 2)
    ignored = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # alive, so that no address is used again
        return tensor

    def enter(_: Any, positional: tuple[torch.Tensor, ...], named: dict[str, Any]) -> Any:
        hidden = positional[0].detach().requires_grad_()
        ignored.add(hidden.untyped_storage().data_ptr())
        hooks.__enter__()
        return (hidden, *positional[1:]), named

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.register_forward_hook(lambda *_: hooks.__exit__(None, None, None))
    positions = torch.arange(seq_len).reshape(documents, -1) % (seq_len // documents)
    model(torch.zeros(1, seq_len, dtype=torch.long), position_ids=positions.reshape(1, -1), use_cache=False)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in ignored)


@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_block_keeps_as_many_bytes_as_torch_saves(model_type: str, documents: int) -> None:
    settings = CONFIGS.get(model_type, SMALL)
    shapes = model_shapes({"model_type": model_type, **settings}, "test")
    recipe = recipe_with("data.seq_len=256", "adapter.rank=1", f"data.packing={documents > 1}")
    measured = bytes_kept_of_a_block(model_type, settings, 256, documents)
    assert activations.block_saved(shapes, recipe) == pytest.approx(measured, rel=0.015)


def test_one_block_of_llama_2_70b_takes_62_hidden_bytes_a_token_in_backward() -> None:
    """Published runs of other stacks take 62.6 to 70.6."""
    shapes = shapes_of("llama-2-70b")
    recipe = recipe_with("data.packing=false", "data.seq_len=1024", "adapter.rank=1", "memory.activation_offload=true")
    static = activations.recomputed_inputs(shapes, recipe) + activations.call_arguments(shapes, recipe)
    in_block = activations.in_recomputed_backward(shapes, recipe) - static
    assert in_block / 1024 / shapes.hidden == pytest.approx(62.5, abs=0.1)


@pytest.mark.parametrize("together", [1, 3])
def test_block_inputs_are_two_bytes_a_token_hidden_layer_and_micro_batch(together: int) -> None:
    recipe = recipe_with("data.seq_len=100", f"memory.micro_batches_together={together}")
    assert activations.block_inputs(shapes_of("llama-7b"), recipe, 32) == together * 2 * 32 * 4096 * 100


def test_micro_batches_that_pass_together_are_at_most_those_of_a_step() -> None:
    shapes, few = shapes_of("llama-7b"), ("train.grad_accumulation=2", "memory.micro_batches_together=8")
    as_many = activations.kept_activations(shapes, recipe_with("memory.micro_batches_together=2"))
    assert activations.kept_activations(shapes, recipe_with(*few)) == as_many


@pytest.mark.parametrize("recomputed", [0, 5, 32])
def test_kept_blocks_keep_all_they_save_and_the_output_of_the_last(recomputed: int) -> None:
    shapes, recipe = shapes_of("llama-7b"), recipe_with(f"memory.gradient_checkpointing={recomputed}")
    state, kept = hidden_state(shapes, recipe), 32 - recomputed
    expected = 32 * state + kept * activations.block_saved(shapes, recipe) + (state if kept else 0)
    found = activations.kept_activations(shapes, recipe) - activations.call_arguments(shapes, recipe)
    assert found == expected


def test_a_number_of_blocks_is_what_true_and_false_stand_for() -> None:
    shapes = shapes_of("llama-7b")
    for word, number in (("true", 32), ("true", 99), ("false", 0), ("auto", 32)):
        one, other = (recipe_with(f"memory.gradient_checkpointing={value}") for value in (word, number))
        assert activations.kept_activations(shapes, one) == activations.kept_activations(shapes, other)


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("together", [1, 4])
def test_offload_leaves_two_inputs_on_the_device(tier: str, together: int) -> None:
    settings = (f"memory.activation_offload={tier}", f"memory.micro_batches_together={together}")
    shapes, recipe = shapes_of("llama-7b"), recipe_with(*settings)
    state = hidden_state(shapes, recipe)
    assert activations.recomputed_inputs(shapes, recipe) == 2 * state
    assert activations.offloaded_inputs(shapes, recipe, tier) == 32 * together * state  # a power of two already


def test_offloaded_inputs_are_those_of_recomputed_blocks() -> None:
    settings = ("memory.activation_offload=disk", "memory.gradient_checkpointing=10", "data.seq_len=100")
    shapes, recipe = shapes_of("llama-7b"), recipe_with(*settings)
    assert activations.offloaded_inputs(shapes, recipe, "disk") == 10 * 100 * 4096 * 2
    assert activations.offloaded_inputs(shapes, recipe, "host") == 0


def test_offload_takes_host_memory_in_slabs_of_a_power_of_two() -> None:
    settings = ("memory.activation_offload=host", "memory.gradient_checkpointing=10", "data.seq_len=5")
    room, slab = 40_960, 1 << 18  # 5 x 4096 bf16 values; four of them are less than 256 KiB, six are not
    assert 4 * room < slab < 7 * room
    assert activations.offloaded_inputs(shapes_of("llama-7b"), recipe_with(*settings), "host") == 2 * slab


@pytest.mark.parametrize(("seq_len", "masked"), [(4096, False), (4097, True)])
def test_sequences_beyond_the_window_need_a_mask(seq_len: int, masked: bool) -> None:
    recipe = recipe_with("data.packing=false", f"data.seq_len={seq_len}")
    assert activations.is_masked(shapes_of("mistral-7b-v0.1"), recipe) is masked
    assert not activations.is_masked(shapes_of("llama-7b"), recipe)
