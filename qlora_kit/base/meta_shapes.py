"""Shapes of a model without a row in ARCHITECTURES, by building transformers' own class of it on the meta device.

Why: `plan` is to answer for any decoder that transformers has, though this kit trains only those of its table. How: the
class is built without memory and without code from outside; the longest list of modules of one class is its blocks,
linears in them are what is quantized, and every other tensor is counted where it stands. So the static components are
exact. What runs between the linears no tensor tells: who feeds whom is read from names, and what is not known counts as
in Llama; so activations are an estimate. Costs seconds: torch is imported. Imported by: plan_command, when called.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.architecture_parts import LAYERS_LIMIT, Config, LinearShape, TensorShape, dimension
from qlora_kit.architectures import Architecture, architecture_of
from qlora_kit.base.loader import build_on_meta
from qlora_kit.errors import ModelError
from qlora_kit.planning.shapes import ModelShapes

COMPOSED = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh_python", "quick_gelu")  # activations made of small steps
AFTER_ATTENTION = ("o_proj", "out_proj", "dense", "c_proj", "wo")
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def meta_shapes(config: Config, source: str) -> tuple[ModelShapes, list[str]]:
    """The shapes of a config by transformers' own class, and what of the plan is then not exact, in words.

    Raises: ModelError: transformers does not know the architecture or refuses the config, or its blocks are no
        attention and MLP that could be told apart.
    """
    from transformers import CONFIG_MAPPING

    if isinstance(config.get("text_config"), dict) or config.get("model_type") not in CONFIG_MAPPING:
        architecture_of(config, source)  # raises: says what is known
    for key in LAYER_KEYS:
        dimension(config, key, default=1, limit=LAYERS_LIMIT)
    model = build_on_meta(dict(config), torch.bfloat16, source)
    path, blocks = _blocks(model, source)
    largest = max(blocks, key=_parameters)
    linears, fused = _linears(largest, model.config.hidden_size)
    notes: list[str] = []
    if len({_parameters(block) for block in blocks}) > 1:
        notes.append("its blocks differ, each is counted as the largest")
    experts = _experts(model.config) if fused else (1, 1)
    row = _row(model, path, largest, linears, source)
    return _shapes(model, row, largest, linears, experts, source), notes


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _blocks(model: Any, source: str) -> tuple[str, list[nn.Module]]:
    """(path, modules) of the list of one class that holds most parameters."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len({type(item) for item in module}) == 1:
            found.append((_parameters(module), path, list(module)))
    if not found:
        raise ModelError(
            f"{source}: model_type {model.config.model_type!r} has no list of equal blocks; cannot plan it"
        )
    _, path, blocks = max(found, key=lambda item: item[0])
    return path, blocks


def _linears(block: nn.Module, hidden: int) -> tuple[list[LinearShape], list[str]]:
    """A block's linears; and the names of fused experts [E, out, in] or [E, in, out], counted as E linears each."""
    from transformers.pytorch_utils import Conv1D

    linears, fused = [], []
    for name, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            linears.append(LinearShape(name, outputs, inputs, module.bias is not None))
    for name, parameter in block.named_parameters():
        if parameter.dim() == 3 and "experts" in name:
            fused.append(name)
            prefix, _, leaf = name.rpartition(".")
            count, wide = parameter.shape[0], parameter.shape[1:].numel() // hidden
            outputs, inputs = (hidden, wide) if "down" in leaf else (wide, hidden)
            linears += [LinearShape(f"{prefix}.{index}.{leaf}", outputs, inputs) for index in range(count)]
    return linears, fused


def _experts(config: Any) -> tuple[int, int]:
    """How many experts an MLP has, and how many of them a token passes."""
    counts = (getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    count = next((count for count in counts if count), 1)
    return count, min(count, getattr(config, "num_experts_per_tok", None) or count)


# ------------------------------------------------------------------------------------------- who feeds whom, by names


def _row(model: Any, path: str, block: nn.Module, linears: list[LinearShape], source: str) -> Architecture:
    """The row that ARCHITECTURES would have."""
    hidden = model.config.hidden_size
    attention = [linear for linear in linears if "attn" in linear.name or "attention" in linear.name]
    mlp = [linear for linear in linears if linear not in attention]
    last = next((linear for linear in reversed(mlp) if linear.out_features == hidden), None)
    if len(attention) < 2 or last is None:
        raise ModelError(
            f"{source}: model_type {model.config.model_type!r} is not supported, and its blocks are no attention and "
            f"MLP that could be planned: {', '.join(linear.name for linear in linears) or 'no linears'}"
        )
    after = next((linear for linear in attention if linear.name.rpartition(".")[2] in AFTER_ATTENTION), attention[-1])
    ending = last.name.rpartition(".")[0]
    before = [linear for linear in mlp if linear.in_features == hidden and linear.name.rpartition(".")[0] == ending]
    before = [linear for linear in before if linear != last] or [linear for linear in mlp if linear != last][:1]
    norms = [module for name, module in block.named_modules() if "norm" in type(module).__name__.lower()]
    rms = any("RMS" in type(module).__name__ for module in norms)
    names = [name for name, _ in model.named_modules()]
    activation = getattr(model.config, "hidden_act", None) or getattr(model.config, "activation_function", None)
    parallel = getattr(model.config, "use_parallel_residual", False)
    wide = sum(linear.out_features for linear in before)
    window = getattr(model.config, "sliding_window", None)
    window = None if getattr(model.config, "use_sliding_window", True) is False else window
    return Architecture(
        blocks=path,
        embedding=_name_of(model, model.get_input_embeddings()),
        head=_name_of(model, model.get_output_embeddings()),
        linears=lambda config: linears,
        block_tensors=lambda config: [],
        outer_tensors=lambda config: [],
        attention_in=tuple(linear.name for linear in attention if linear != after),
        attention_out=after.name,
        mlp_in=tuple(linear.name for linear in before),
        mlp_out=last.name,
        mlp_saved=3 if wide >= 2 * last.in_features else 4 if activation in COMPOSED else 1,
        layer_norm_copies=None if rms else max(0, len(norms) - 1) * (not parallel),
        output_norm=any(name.endswith("post_feedforward_layernorm") for name in names),
        rotary=any("rotary" in name for name in names),
        eager_attention=bool(getattr(model.config, "attn_logit_softcapping", None)) or not model._supports_sdpa,
        window=lambda config: window,
        transposed=any(type(module).__name__ == "Conv1D" for module in block.modules()),
    )


def _name_of(model: nn.Module, wanted: Any) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


# -------------------------------------------------------------------------------------------------- every tensor


def _own_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """State of a module by name; a tied tensor once, under its first name."""
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _shapes(
    model: Any, row: Architecture, block: nn.Module, linears: list[LinearShape], experts: tuple[int, int], source: str
) -> ModelShapes:
    own: dict[str, LinearShape] = {f"{linear.name}.weight": linear for linear in linears}
    fused = {name for name, parameter in block.named_parameters() if parameter.dim() == 3 and "experts" in name}
    in_block: list[TensorShape] = [
        (name, tuple(tensor.shape)) for name, tensor in _own_tensors(block) if name not in own and name not in fused
    ]
    outer = [
        (name, tuple(tensor.shape)) for name, tensor in _own_tensors(model) if not name.startswith(f"{row.blocks}.")
    ]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return ModelShapes(
        source=source,
        architecture=row,
        hidden=model.config.hidden_size,
        heads=model.config.num_attention_heads,
        layers=len(model.get_submodule(row.blocks)),
        vocabulary=embedding.weight.shape[0],
        tied=head is None or head.weight is embedding.weight,
        softcap=getattr(model.config, "final_logit_softcapping", None),
        linears=tuple(linears),
        block_tensors=tuple(in_block),
        outer_tensors=tuple(outer),
        window=row.window({}),
        model_type=model.config.model_type,
        experts=experts,
    )
