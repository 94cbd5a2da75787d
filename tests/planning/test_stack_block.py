"""What one block keeps in the `peft` stack, against transformers and peft themselves: bytes that autograd saves."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from qlora_kit.planning.quantities import FP32
from qlora_kit.planning.shapes import model_shapes
from qlora_kit.planning.stack_block import block_bytes, is_wide, value
from qlora_kit.planning.stack_moments import in_stack
from qlora_kit.planning.stacks import STACKS
from qlora_kit.recipe import Recipe, recipe_for_model

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
}
TARGETS = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "all": "all-linear"}
RANK = 8


def peft_model(layers: int, quantization: str, targets: Any, folder: Any) -> Any:
    """A Llama of a few blocks with branches, prepared as peft's guides do."""
    LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).bfloat16().save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=settings if quantization == "nf4" else None, device_map="cpu"
    )
    if quantization == "nf4":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.enable_input_require_grads()
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=targets, task_type="CAUSAL_LM"))


def saved_bytes(model: Any, count: int) -> int:
    """Bytes of all storages that a forward of so many tokens saves for backward, parameters included, each once."""
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(model(input_ids=torch.zeros(1, count, dtype=torch.long), use_cache=False).logits)
    return sum(storages.values())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("targets", TARGETS)
def test_a_block_saves_for_a_token_what_is_planned(quantization: str, targets: str, tmp_path: Any) -> None:
    found = {}
    for layers in (1, 2):
        model = peft_model(layers, quantization, TARGETS[targets], tmp_path / str(layers))
        found[layers] = (saved_bytes(model, 128) - saved_bytes(model, 64)) // 64
    shapes = model_shapes({"model_type": "llama", "num_hidden_layers": 2, **SHAPE}, "test")
    wanted = in_stack(settings(quantization, targets), STACKS["peft"])
    planned = block_bytes(shapes, wanted, STACKS["peft"])
    if is_wide(shapes, wanted, STACKS["peft"]):  # the norm reads the block's input, an fp32 tensor, as it is
        planned += value(shapes, wanted, STACKS["peft"]) * shapes.hidden
    assert found[2] - found[1] == planned + 2 * FP32  # the reciprocal square roots of two norms


def settings(quantization: str, targets: str) -> Recipe:
    """The same as a recipe."""
    names = "all-linear" if targets == "all" else f"[{', '.join(TARGETS[targets])}]"
    return recipe_for_model(
        "m",
        (
            f"model.quantization={quantization}",
            f"adapter.rank={RANK}",
            f"adapter.target_modules={names}",
            "data.packing=false",
        ),
    )
