"""From a model folder to a frozen base on the device: one tensor in flight, nothing initialised at random.

How: transformers builds the model on the meta device; the linears of the decoder blocks become `FrozenLinear`; each
tensor is read, moved, quantized or cast, and dropped. A tensor that is missing, unexpected or of another shape is an
error that names it (transformers would initialise it at random and go on).
Imported by: training.loop, generation, export, the commands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit import recipe
from qlora_kit.architectures import Architecture, architecture_of
from qlora_kit.base import nf4
from qlora_kit.base.device import free_bytes
from qlora_kit.base.linear import FrozenLinear
from qlora_kit.base.prequantized import PART, PackedWeight, packed_weights
from qlora_kit.base.shards import Shards, find_shards
from qlora_kit.base.source import base_fingerprint, resolve_folder
from qlora_kit.base.streaming import BlockStreamer, InFiles, Placement, stream_blocks
from qlora_kit.base.vocabulary import FetchedEmbedding, FetchedHead, Table, fetch_from
from qlora_kit.base.workspace import Workspace
from qlora_kit.console import note, progress
from qlora_kit.errors import ModelError
from qlora_kit.planning.hardware import host_memory_bytes
from qlora_kit.planning.shapes import model_shapes, read_config

CACHE_SHARE = 0.7  # of the free memory, that files may take which are read in every step
UNSAFE_CONFIG_KEYS = frozenset({"auto_map", "attn_implementation", "experts_implementation"})  # fetch or run code
DECIDED_HERE = frozenset({"quantization_config", "transformers_version", "torch_dtype", "dtype"})


@dataclass(frozen=True)
class Base:
    """A frozen base model, ready to run.

    Attributes:
        model: transformers' causal language model; in eval mode for good, no parameter requires a gradient.
        folder: where its files are.
        fingerprint: of the weights on disk, before quantization: hex digest over names, dtypes, shapes and samples.
        streamer: brings in the blocks that do not live on the device; None: all of them do.
        updates: what each adapter makes of tensors that are no weight of a block's linear, by name; see
            `adapters.tensors`.
        replaced: the base's own, while adapters have others in their place; None: it was given up.
    """

    model: Any
    architecture: Architecture
    settings: recipe.Model
    folder: Path
    fingerprint: str
    device: torch.device
    streamer: BlockStreamer | None = None
    updates: dict[str, dict[str, Any]] = field(default_factory=dict)
    replaced: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of computation."""
        return getattr(torch, self.settings.dtype)

    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return self.model.get_submodule(self.architecture.blocks)

    def linears(self) -> dict[str, FrozenLinear]:
        """The frozen linears of the blocks by full name, in the model's order."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, FrozenLinear)}


@contextlib.contextmanager
def held_weights(base: Base, share: float = 0.25) -> Iterator[None]:
    """Within the block every linear keeps its dequantized weight, if all of them fit in a share of the free memory.

    The same values, so the same results; worth it where a forward sees few tokens, as in generation. Does nothing for a
    base whose blocks are streamed: memory is what it lacks.
    """
    linears = [linear for linear in base.linears().values() if linear.quantization != "none"]
    needed = sum(linear.in_features * linear.out_features for linear in linears) * base.dtype.itemsize
    if base.streamer is None and needed <= share * free_bytes(base.device):
        for linear in linears:
            linear.held = linear.base_weight()
    try:
        yield
    finally:
        for linear in linears:
            linear.held = None


def load_base(settings: recipe.Model, device: torch.device | str = "cpu", placement: Placement | None = None) -> Base:
    """Load, quantize and freeze a base model.

    Args:
        settings: the recipe's `model` section.
        device: where it is to live.
        placement: of its blocks, embedding and head. With `disk`, weights stay in the files as they are used: of the
            blocks 4-bit ones, or dense ones in the dtype of computation; embedding and head dense in any dtype. What
            the files hold otherwise lives on the device.
    Raises: ModelError: unsupported architecture, or files that are not exactly this model.
    """
    placement = placement or Placement()
    folder, device = resolve_folder(settings.path, settings.revision), torch.device(device)
    config, source = read_config(str(folder))
    shapes = model_shapes(config, source)  # absurd sizes end here
    architecture, tiers = shapes.architecture, placement.tiers(shapes.layers)
    shards = Shards(find_shards(folder))
    packed = packed_weights(shards, architecture, config, source)
    settings = _as_stored(settings, packed, source)
    model = build_frozen(config, settings, device, source, packed)
    homes = {f"{architecture.blocks}.{index}": tier for index, tier in tiers.items()}
    if placement.embeddings == "disk" or (placement.embeddings == "host" and device.type != "cpu"):
        homes |= dict.fromkeys(_dense_vocabulary(architecture, packed or {}, source), placement.embeddings)
    in_files = _fill(model, architecture, shards, packed or {}, device, homes)
    model.eval().requires_grad_(False)
    shards.past_cache = sum(e.size_bytes for e in in_files.values()) > CACHE_SHARE * host_memory_bytes()
    blocks = {index: model.get_submodule(f"{architecture.blocks}.{index}") for index in tiers}
    in_host = {index for index, tier in tiers.items() if tier == "host"}
    streamer = stream_blocks(blocks, in_host, shards, in_files, device) if blocks else None
    return Base(model, architecture, settings, folder, base_fingerprint(shards), device, streamer)


def _as_stored(settings: recipe.Model, packed: dict[str, PackedWeight] | None, source: str) -> recipe.Model:
    """The settings with the quantization that a 4-bit checkpoint has, whatever was asked for.

    Raises: ModelError: nothing in it is quantized, or not all of it to the same type.
    """
    if packed is None:
        return settings
    kinds = {weight.quant_type for weight in packed.values()}
    if len(kinds) != 1:
        raise ModelError(f"{source}: quantization_config: 4-bit weights of one type expected, found {sorted(kinds)}")
    found = {"quantization": kinds.pop(), "double_quant": any(weight.double_quant for weight in packed.values())}
    for key, value in found.items():
        if getattr(settings, key) != value:
            note(f"{source}: model.{key} is {value} in this checkpoint; {getattr(settings, key)} is not used")
    return settings.model_copy(update=found)


def build_frozen(
    config: dict[str, Any],
    settings: recipe.Model,
    device: torch.device,
    source: str,
    packed: dict[str, PackedWeight] | None = None,
) -> Any:
    """transformers' model with a `FrozenLinear` for each linear of its blocks, its weights on meta, to be filled in.

    Args:
        packed: the 4-bit weights that the files hold, by name.
    Raises: ModelError: transformers refuses the config.
    """
    model = build_on_meta(config, getattr(torch, settings.dtype), source)
    _replace_linears(model, architecture_of(config, source), settings, packed)
    _materialise_buffers(model, device)
    return model


def build_on_meta(config: dict[str, Any], dtype: torch.dtype, source: str) -> Any:
    """transformers' model of `config` without any memory, its code the library's own.

    Raises: ModelError: transformers refuses the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {
        key: value for key, value in config.items() if key not in UNSAFE_CONFIG_KEYS | DECIDED_HERE and key[:1] != "_"
    }
    try:
        parsed = AutoConfig.for_model(**fields)
        parsed.use_cache = True
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(parsed, dtype=dtype)
    except Exception as problem:  # validation errors of many kinds, all about the user's file
        raise ModelError(f"{source}: transformers cannot build this model: {problem}") from problem


def _replace_linears(
    model: Any, architecture: Architecture, settings: recipe.Model, packed: dict[str, PackedWeight] | None
) -> None:
    """Put a `FrozenLinear` in the place of each linear of the decoder blocks, stored as settings or files have it."""
    dtype = getattr(torch, settings.dtype)
    blocks, workspace = model.get_submodule(architecture.blocks), Workspace()
    for name, module in list(blocks.named_modules()):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        out_features, in_features = weight.shape[::-1] if architecture.transposed else weight.shape
        stored = None if packed is None else packed.get(f"{architecture.blocks}.{name}.weight")
        frozen = FrozenLinear(
            in_features,
            out_features,
            bias=module.bias is not None,
            quantization=stored.quant_type if stored else settings.quantization if packed is None else "none",
            double_quant=stored.double_quant if stored else settings.double_quant,
            dtype=dtype,
            block=stored.block if stored else nf4.BLOCK,
        )
        frozen.workspace = workspace
        parent, _, leaf = name.rpartition(".")
        setattr(blocks.get_submodule(parent), leaf, frozen)


def _fill(
    model: Any,
    architecture: Architecture,
    shards: Shards,
    packed: dict[str, PackedWeight],
    device: torch.device,
    homes: dict[str, str],
) -> InFiles:
    """Give every weight of the model its tensor from the files; returns those of the linears that stay there.

    Args:
        homes: name of a block -> `host` or `disk`, for blocks whose linears do not live on the device; and the same for
            the names of embedding and head.
    """
    in_files: InFiles = {}
    names = _match_names(model, architecture, shards)
    total = sum(shards.entries[stored].size_bytes for stored in names.values())
    with progress("loading the base", total) as advance:
        for target, stored in names.items():
            entry = shards.entry(stored)
            where = f"{entry.path}: {stored}"
            linear = model.get_submodule(target.rpartition(".")[0])
            tier = homes.get(".".join(target.split(".")[: architecture.blocks.count(".") + 2]), "device")
            away = tier != "device" and isinstance(linear, FrozenLinear) and target.endswith(".weight")
            home = torch.device("cpu") if away and tier == "host" else device
            if target in homes:
                _place_away(model, target, Table(device, linear.weight.dtype, shards, entry), tier, where)
            elif (
                away
                and tier == "disk"
                and (names_left := _leave(linear, stored, packed.get(target), shards, device, architecture))
            ):
                in_files |= {(linear, name): shards.entry(file_name) for name, file_name in names_left.items()}
            elif target in packed:
                _place_packed(model, target, packed[target], shards, home, where)
            else:
                _place(model, architecture, target, shards.read(stored), home, where)
            advance(entry.size_bytes, "")
    embedding = model.get_submodule(architecture.embedding)
    if model.config.tie_word_embeddings and isinstance(embedding, FetchedEmbedding):
        model.set_submodule(architecture.head, FetchedHead(embedding.table))
    else:
        model.tie_weights()
    return in_files


def _dense_vocabulary(architecture: Architecture, packed: dict[str, PackedWeight], source: str) -> list[str]:
    """Names of embedding and head, without those that the files hold in 4 bits: these are dequantized at load."""
    names = [f"{architecture.embedding}.weight", f"{architecture.head}.weight"]
    for name in packed.keys() & set(names):
        note(f"{source}: {name} is in 4 bits; it is dequantized, and stays on the device")
    return [name for name in names if name not in packed]


def _leave(
    linear: FrozenLinear,
    stored: str,
    packed: PackedWeight | None,
    shards: Shards,
    device: torch.device,
    architecture: Architecture,
) -> dict[str, str]:
    """Names in the files of the stored tensors that can stay there until they are used; empty: they cannot."""
    shape = (linear.out_features, linear.in_features)
    if packed is None:
        entry = shards.entry(stored)
        as_used = linear.quantization == "none" and not architecture.transposed
        return {"dense": stored} if as_used and (entry.dtype, entry.shape) == (linear.dtype, shape) else {}
    if packed.shape != shape:
        return {}  # placing it will say what is wrong
    names = packed.bulk(shards)
    small = {name: value.to(device) for name, value in packed.read_small(shards).items()}
    linear.take({name: getattr(linear, name) for name in names} | small)
    return names


def _match_names(model: Any, architecture: Architecture, shards: Shards) -> dict[str, str]:
    """Name in the model -> name in the files, for every tensor.

    Raises: ModelError: a tensor is missing or unexpected.
    """
    wanted = [name for name, _ in expected_tensors(model)]
    stored = {architecture.name_in_model(name): name for name in shards.entries if not PART.fullmatch(name)}
    stored.pop(None, None)
    head = f"{architecture.head}.weight"
    if model.config.tie_word_embeddings:  # the head is the embedding, whatever the files hold under its name
        wanted = [name for name in wanted if name != head]
        stored.pop(head, None)
    folder = next(iter(shards.entries.values())).path.parent
    if missing := [name for name in wanted if name not in stored]:
        raise ModelError(f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} of {len(wanted)} are)")
    if unexpected := [name for name in stored if name not in wanted]:
        raise ModelError(
            f"{folder}: tensor {stored[unexpected[0]]!r} is unexpected ({len(unexpected)} are): "
            f"the files do not belong to this config.json ({model.config.model_type})"
        )
    return {name: stored[name] for name in wanted}


def expected_tensors(model: Any) -> Iterable[tuple[str, Tensor | FrozenLinear]]:
    """(name of the stored tensor, parameter or the linear that takes it) for a model with replaced linears."""
    frozen = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    for name, module in frozen.items():
        yield f"{name}.weight", module
        if module.bias is not None:
            yield f"{name}.bias", module.bias
    for name, parameter in model.named_parameters():
        yield name, parameter


def _place(model: Any, architecture: Architecture, name: str, value: Tensor, device: torch.device, where: str) -> None:
    """Put one tensor where it belongs.

    Raises: ModelError: its shape is not the model's.
    """
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    is_weight = isinstance(module, FrozenLinear) and leaf == "weight"
    if is_weight and architecture.transposed:
        value = value.t()
    shape = (module.out_features, module.in_features) if is_weight else tuple(getattr(module, leaf).shape)
    if tuple(value.shape) != shape:
        raise ModelError(f"{where}: shape {list(value.shape)}, the config asks for {list(shape)}")
    if is_weight:
        module.store(value.to(device))
    elif isinstance(module, FrozenLinear):
        module.bias = value.to(device, module.dtype)
    else:
        dtype = getattr(module, leaf).dtype
        setattr(module, leaf, nn.Parameter(value.to(device, dtype), requires_grad=False))


def _place_away(model: Any, name: str, table: Table, tier: str, where: str) -> None:
    """Let the embedding, or the head, fetch its rows from a table. Raises: ModelError: its shape is not the model's."""
    shape = tuple(model.get_submodule(name.removesuffix(".weight")).weight.shape)
    if table.entry.shape != shape:
        raise ModelError(f"{where}: shape {list(table.entry.shape)}, the config asks for {list(shape)}")
    fetch_from(model, name, table.on_host() if tier == "host" else table)


def _place_packed(
    model: Any, name: str, packed: PackedWeight, shards: Shards, device: torch.device, where: str
) -> None:
    """Give a linear the codes that the files hold; a weight outside the blocks (a head) is dequantized.

    Raises: ModelError: its shape is not the model's.
    """
    module = model.get_submodule(name.removesuffix(".weight"))
    frozen = isinstance(module, FrozenLinear)
    shape = (module.out_features, module.in_features) if frozen else tuple(module.weight.shape)
    if packed.shape != shape:
        raise ModelError(f"{where}: shape {list(packed.shape)}, the config asks for {list(shape)}")
    if frozen:
        module.take({key: value.to(device) for key, value in packed.read(shards).items()})
    else:
        module.weight = nn.Parameter(packed.dequantize(shards, module.weight.dtype).to(device), requires_grad=False)


def _materialise_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no file holds (rotary frequencies, embedding scales), by transformers' own rules.

    Called before the weights are filled in: `_init_weights` would draw those at random, and on meta it cannot.
    """
    for module in model.modules():
        names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not names or isinstance(module, FrozenLinear):
            continue
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        model._init_weights(module)
        for name in names:
            module._buffers[name] = module._buffers[name].to(device)
