"""A run before its first step: the data read, the base placed, the adapter hung in, the optimizer built.

How: `prepare` does it from a recipe's files; `assemble` from a loaded base and tokens, which is how tools and proofs
run the real training code on data of their own making. Imported by: training.loop, the commands, tools, tests.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_kit import files
from qlora_kit.adapter_files import WEIGHTS
from qlora_kit.adapters.inject import inject, trainable_parameters
from qlora_kit.adapters.lora import DropoutSeed
from qlora_kit.adapters.store import continue_adapter
from qlora_kit.base.device import keep_freed_memory, pick_device, return_freed_memory
from qlora_kit.base.loader import Base, load_base
from qlora_kit.base.owners import hand_over
from qlora_kit.base.quantize_model import is_quantized, quantize_model
from qlora_kit.base.shards import Shards, find_shards
from qlora_kit.base.source import base_fingerprint, resolve_folder
from qlora_kit.base.streaming import Placement
from qlora_kit.console import note, warn
from qlora_kit.data.batches import Batches, MicroBatch, eval_batches
from qlora_kit.data.tokenize import Example, load_examples, load_tokenizer, split_examples
from qlora_kit.errors import ModelError
from qlora_kit.planning.components import loss_chunk_tokens
from qlora_kit.recipe import Recipe
from qlora_kit.training.blocks import attach
from qlora_kit.training.checkpoint import Progress
from qlora_kit.training.offload import input_store
from qlora_kit.training.optim import build_optimizer
from qlora_kit.training.signals import StopRequest

# Keys that change where a run lives or how often it speaks, but not one bit of its result; and `on_oom`, so that a run
# which ran out of memory can go on with `split`: what that does is in the checkpoint (`Progress.rows`).
FREE_KEYS = frozenset(
    "model.path model.revision model.keep_quantized adapter.start_from data.train data.eval memory.budget "
    "memory.placement memory.resident_blocks memory.host_blocks memory.embeddings memory.gradient_checkpointing "
    "memory.activation_offload memory.keep_dequantized memory.micro_batches_together memory.on_oom train.eval_every "
    "train.save_every train.keep_checkpoints train.trackers train.device output".split()
)


@dataclass(frozen=True)
class Peak:
    """What was in use at the highest point of a step that was followed byte by byte.

    Attributes:
        step: its number, from 1.
        place: the part of the step in which that was.
        components: bytes by the ledger's names and OTHER.
    """

    step: int
    place: str
    components: dict[str, int]


@dataclass
class Run:
    """Everything that a step needs; `peak` is of a step that was followed, if one was."""

    recipe: Recipe
    base: Base
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    batches: Batches
    held_out: list[MicroBatch]
    total_steps: int
    identity: dict[str, str]
    progress: Progress
    stop: StopRequest
    peak: Peak | None = None

    @property
    def output(self) -> Path:
        return Path(self.recipe.output)

    @property
    def chunk_tokens(self) -> int:
        return loss_chunk_tokens(self.recipe)

    @property
    def rows(self) -> int:
        """Rows of a forward, at most."""
        return self.progress.rows or self.recipe.train.micro_batch

    @property
    def together(self) -> int:
        """Micro-batches that pass each block together."""
        wanted = self.recipe.memory.micro_batches_together
        return 1 if wanted == "auto" or self.progress.rows is not None else wanted


def make_gradients(run: Run) -> None:
    """Gradients of zero: the memory that a micro-batch finds taken by those before it."""
    for parameter in run.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    hand_over("gradients", (parameter.grad for parameter in run.parameters.values()))


def choose_heap(device: torch.device, roomy: bool) -> None:
    """Where a plan is tight, have freed memory given back at once; on a CPU where it is roomy, never."""
    if not roomy:
        return_freed_memory()
    elif device.type == "cpu":
        keep_freed_memory()


def prepare(recipe: Recipe, stop: StopRequest) -> Run:
    """Read the data, load the base, hang the adapter in, build the optimizer: all that comes before the first step."""
    train_examples, eval_examples = read_data(recipe)
    base = place_base(recipe, pick_device(recipe.train.device))
    _require_embeddings(base, recipe, [*train_examples, *eval_examples])
    return assemble(recipe, base, train_examples, eval_examples, stop)


def assemble(
    recipe: Recipe, base: Base, train_examples: list[Example], eval_examples: list[Example], stop: StopRequest
) -> Run:
    """A run on a loaded base and tokenized data; tools and proofs call it with data of their own making."""
    adapter = recipe.adapter
    fresh = adapter.start_from is None
    dropout_seed = inject(base, adapter, recipe.train.seed) if fresh else continue_adapter(base, adapter)
    _attach(base, recipe, dropout_seed)
    parameters = dict(trainable_parameters(base))
    settings = recipe.train
    optimizer = build_optimizer(settings, parameters, base.device, master_weights=recipe.keeps_master_weights)
    shape: dict[str, Any] = {
        "micro_batch": settings.micro_batch,
        "seq_len": recipe.data.seq_len,
        "packing": recipe.data.packing,
    }
    batches = Batches(
        train_examples, **shape, grad_accumulation=settings.grad_accumulation, seed=settings.seed, pad_id=0
    )
    return Run(
        recipe=recipe,
        base=base,
        parameters=parameters,
        optimizer=optimizer,
        batches=batches,
        held_out=eval_batches(eval_examples, **shape, pad_id=0) if eval_examples else [],
        total_steps=settings.steps or math.ceil((settings.epochs or 1) * batches.steps_per_epoch),
        identity=run_identity(recipe, base, train_examples),
        progress=Progress(),
        stop=stop,
    )


def _attach(base: Base, recipe: Recipe, dropout_seed: DropoutSeed) -> None:
    """Put the blocks under the recipe's memory switches; what is still `auto` takes no memory for speed."""
    memory, output = recipe.memory, Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    attach(
        base,
        True if memory.gradient_checkpointing == "auto" else memory.gradient_checkpointing,
        tile_tokens=memory.tile_tokens,
        keep_dequantized=memory.keep_dequantized is True,
        dropout_seed=dropout_seed,
        store=input_store(memory.activation_offload or "device", base.device, output),
    )


def placement_of(recipe: Recipe) -> Placement:
    """Where the recipe puts the weights; of what is still `auto` nothing is kept beside where most of it lives."""
    memory = recipe.memory
    tier, embeddings = ("device" if wanted == "auto" else wanted for wanted in (memory.placement, memory.embeddings))
    resident, host = (0 if wanted == "auto" else wanted for wanted in (memory.resident_blocks, memory.host_blocks))
    return Placement(tier, resident, embeddings, host)


def place_base(recipe: Recipe, device: torch.device) -> Base:
    """The base, its blocks where `memory.placement` says, embedding and head where `memory.embeddings` does.

    If the model is no 4-bit checkpoint and blocks are to be read from disk, or the recipe wants one kept
    (`model.keep_quantized`), one is made, once.
    """
    settings, placement = recipe.model, placement_of(recipe)
    folder = resolve_folder(settings.path, settings.revision)
    kept = Path(settings.keep_quantized) if settings.keep_quantized else None
    if settings.quantization == "none" or is_quantized(folder) or (placement.tier != "disk" and kept is None):
        return load_base(settings, device, placement)
    checkpoint = kept or Path(recipe.output) / f"base-{settings.quantization}"
    if not checkpoint.exists():
        note(f"{checkpoint}: quantizing the base once; it is loaded from there from now on")
        quantize_model(
            folder,
            checkpoint,
            quant_type=settings.quantization,
            double_quant=settings.double_quant,
            dtype=settings.dtype,
        )
    loaded = load_base(settings.model_copy(update={"path": str(checkpoint)}), device, placement)
    if loaded.fingerprint != base_fingerprint(Shards(find_shards(folder))):
        raise ModelError(f"{checkpoint}: made from another model than {folder}; remove it, and it is made again")
    return replace(loaded, settings=settings, folder=folder)


def read_data(recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """Training examples and held-out examples (none if the recipe has none); says what was read."""
    tokenizer = load_tokenizer(resolve_folder(recipe.model.path, recipe.model.revision))
    examples, report = load_examples(Path(recipe.data.train), recipe.data, tokenizer)
    note(report.describe(recipe.data.train))
    if recipe.data.eval is None:
        return examples, []
    if not isinstance(recipe.data.eval, str):
        return split_examples(examples, recipe.data.eval, recipe.train.seed)
    held_out, report = load_examples(Path(recipe.data.eval), recipe.data, tokenizer)
    note(report.describe(recipe.data.eval))
    return examples, held_out


def _require_embeddings(base: Base, recipe: Recipe, examples: list[Example]) -> None:
    """Raises: ModelError: a token id or a position that the base has no embedding for."""
    rows = base.model.get_input_embeddings().weight.shape[0]
    for example in examples:
        if max(example.input_ids) >= rows:
            raise ModelError(
                f"{base.folder}: the tokenizer gives id {max(example.input_ids)} ({example.source}), the embedding has "
                f"{rows} rows; tokenizer and model do not belong together"
            )
    positions = getattr(base.model.config, "max_position_embeddings", None)
    if positions is None or recipe.data.seq_len <= positions:
        return
    message = f"{base.folder}: was made for {positions} positions, data.seq_len is {recipe.data.seq_len}"
    if not base.architecture.rotary:
        raise ModelError(f"{message}; lower it")
    warn(f"{message}: rotary positions go on, but the base has never seen them")


def run_identity(recipe: Recipe, base: Base, examples: list[Example]) -> dict[str, str]:
    """What must not change between the parts of one run, by name."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.input_ids, example.targets):
            digest.update(len(ids).to_bytes(8, "little") + array("i", ids).tobytes())
    values = recipe.model_dump(mode="json")
    keys = {
        f"{section}.{key}": str(value)
        for section, part in values.items()
        if isinstance(part, dict)
        for key, value in part.items()
    }
    kept = {key: value for key, value in keys.items() if key not in FREE_KEYS}
    if recipe.adapter.start_from is not None:
        kept["adapter.start_from (its tensors)"] = files.sha256(Path(recipe.adapter.start_from) / WEIGHTS)
    return kept | {"base": base.fingerprint, "training data (as tokenized)": digest.hexdigest()[:32]}
