"""The one training loop, top to bottom: load, inject, then for each optimizer step its micro-batches.

A step is a pure function of (recipe, base, data, state after the step before): sample order and dropout come from
(seed, step, micro-batch), the learning rate from the step. So a resumed run is, bit for bit,
the run that was not stopped.
Imported by: the `train` command, the quickstart, tests.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit import files
from qlora_kit.adapters.inject import inject, trainable_parameters
from qlora_kit.adapters.lora import DropoutSeed
from qlora_kit.adapters.store import save_adapter
from qlora_kit.base.device import (
    peak_bytes,
    pick_device,
    reset_peak,
    resident_bytes,
    return_freed_memory,
    trim_freed_memory,
)
from qlora_kit.base.loader import Base, Placement, base_fingerprint, load_base, resolve_folder
from qlora_kit.base.quantize_model import is_quantized, quantize_model
from qlora_kit.base.shards import Shards, find_shards
from qlora_kit.console import note, warn
from qlora_kit.data.batches import Batches, MicroBatch, eval_batches
from qlora_kit.data.tokenize import Example, load_examples, load_tokenizer, split_examples
from qlora_kit.errors import ModelError, NonFiniteError, RecipeError, Stopped
from qlora_kit.planning.components import loss_chunk_tokens
from qlora_kit.profiling.report import write_memory
from qlora_kit.recipe import Recipe
from qlora_kit.training.blocks import attach
from qlora_kit.training.checkpoint import Progress, load_checkpoint, rotate, save_checkpoint
from qlora_kit.training.evaluate import Evaluation, evaluate
from qlora_kit.training.loss import batch_losses
from qlora_kit.training.metrics import Metrics, open_metrics
from qlora_kit.training.offload import input_store
from qlora_kit.training.optim import build_optimizer
from qlora_kit.training.schedule import learning_rate
from qlora_kit.training.signals import StopRequest, stop_on_signal

ROOMY_SHARE = 0.7  # of the budget; a plan below it leaves room for a faster, less frugal heap
NON_FINITE_LIMIT = 5  # steps in a row that may be skipped
# Keys that change where a run lives or how often it speaks, but not one bit of its result.
FREE_KEYS = frozenset(
    "model.path model.revision data.train data.eval memory.budget memory.placement memory.resident_blocks "
    "memory.host_blocks memory.embeddings memory.gradient_checkpointing memory.activation_offload "
    "memory.keep_dequantized memory.micro_batches_together train.eval_every train.save_every train.keep_checkpoints "
    "train.trackers train.device output".split()
)


@dataclass
class Run:
    """Everything that a step needs."""

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

    @property
    def output(self) -> Path:
        return Path(self.recipe.output)

    @property
    def chunk_tokens(self) -> int:
        return loss_chunk_tokens(self.recipe)

    @property
    def together(self) -> int:
        """Micro-batches that pass each block together."""
        wanted = self.recipe.memory.micro_batches_together
        return 1 if wanted == "auto" else wanted


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    steps: int
    train_loss: float | None
    first_evaluation: Evaluation | None
    last_evaluation: Evaluation | None
    best_step: int | None
    peak_bytes: int
    seconds: float


def train(recipe: Recipe, *, resume: bool = False, restart: bool = False, plan: dict[str, Any] | None = None) -> Result:
    """Train the adapter of a recipe and save it under `output`.

    Args:
        resume: continue from the newest checkpoint below `output`.
        restart: throw away the run that `output` holds.
        plan: what `plan --json` says of this recipe; kept in the run's folder beside what is measured.
    Raises: every error of `qlora_kit.errors` that the user's files can cause; Stopped: a signal came, state is saved.
    """
    output = Path(recipe.output)
    with files.lock(output), stop_on_signal() as stop:
        _require_unclaimed(output, resume or restart)
        for folder in (output, output / "adapter", output / "best"):
            files.sweep(folder)
        before_bytes = resident_bytes()
        if plan is None or plan["peak_bytes"] > ROOMY_SHARE * plan["budget_bytes"]:
            return_freed_memory()
        run = prepare(recipe, stop)
        if resume:
            run.progress = load_checkpoint(output / "checkpoints", run.parameters, run.optimizer, run.identity)
            note(f"resumed after step {run.progress.step} of {run.total_steps}")
        elif restart:
            _remove_run(output)
        files.write_text(output / "recipe.yaml", recipe.to_yaml())
        files.write_json(output / "plan.json", plan)
        result = _steps(run)
        write_memory(output / "memory.json", plan, run.base.device, before_bytes)
        return result


def prepare(recipe: Recipe, stop: StopRequest) -> Run:
    """Read the data, load the base, hang the adapter in, build the optimizer: all that comes before the first step."""
    train_examples, eval_examples = read_data(recipe)
    base = _place_base(recipe, pick_device(recipe.train.device))
    _require_embeddings(base, recipe, [*train_examples, *eval_examples])
    return assemble(recipe, base, train_examples, eval_examples, stop)


def assemble(
    recipe: Recipe, base: Base, train_examples: list[Example], eval_examples: list[Example], stop: StopRequest
) -> Run:
    """A run on a loaded base and tokenized data; tools and proofs call it with data of their own making."""
    dropout_seed = inject(base, recipe.adapter, recipe.train.seed)
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


def _place_base(recipe: Recipe, device: torch.device) -> Base:
    """The base, its blocks where `memory.placement` says, embedding and head where `memory.embeddings` does.

    Blocks on disk are read from a 4-bit checkpoint. If the model is not one, it is made below `output` once, and kept.
    """
    settings, placement = recipe.model, placement_of(recipe)
    folder = resolve_folder(settings.path, settings.revision)
    if placement.tier != "disk" or settings.quantization == "none" or is_quantized(folder):
        return load_base(settings, device, placement)
    checkpoint = Path(recipe.output) / f"base-{settings.quantization}"
    if not checkpoint.exists():
        note(f"{checkpoint}: quantizing the base once, for its blocks to be read from disk")
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
        digest.update(repr((example.input_ids, example.targets)).encode())
    values = recipe.model_dump(mode="json")
    keys = {
        f"{section}.{key}": str(value)
        for section, part in values.items()
        if isinstance(part, dict)
        for key, value in part.items()
    }
    kept = {key: value for key, value in keys.items() if key not in FREE_KEYS}
    return kept | {"base": base.fingerprint, "training data (as tokenized)": digest.hexdigest()[:32]}


def _present(output: Path) -> list[Path]:
    """What a run has left in its folder."""
    names = ("checkpoints", "adapter", "best", "metrics.jsonl", "memory.json")
    return [output / name for name in names if (output / name).exists()]


def _require_unclaimed(output: Path, allowed: bool) -> None:
    """Raises: RecipeError: the folder holds a run, and neither --resume nor --restart was given."""
    if _present(output) and not allowed:
        raise RecipeError(
            f"output: {output} already holds a run; continue it with --resume, replace it with --restart, "
            "or choose another folder (--set output=...)"
        )


def _remove_run(output: Path) -> None:
    for path in _present(output):
        files.remove_folder(path) if path.is_dir() else path.unlink()


def _steps(run: Run) -> Result:
    """From `run.progress` to the last step."""
    reset_peak(run.base.device)
    started, first, last, loss = time.monotonic(), None, None, None
    settings = run.recipe.train
    metrics_file = run.output / "metrics.jsonl"
    log = open_metrics(
        metrics_file,
        done=run.progress.step,
        total=run.total_steps,
        trackers=list(settings.trackers),
        settings=run.recipe.model_dump(mode="json"),
    )
    with log as metrics:
        if run.progress.step == 0 and run.held_out:
            first = last = _evaluate(run, metrics)
        skipped_in_a_row = 0
        while run.progress.step < run.total_steps:
            line = train_step(run)
            skipped_in_a_row = skipped_in_a_row + 1 if line.get("skipped") else 0
            if skipped_in_a_row == NON_FINITE_LIMIT:
                raise NonFiniteError(
                    f"step {run.progress.step}: loss or gradient was not finite {NON_FINITE_LIMIT} steps in "
                    "a row; lower train.lr, or look at the batches of metrics.jsonl marked skipped"
                )
            loss = line["loss"]
            metrics.step(line)
            done = run.progress.step == run.total_steps
            if run.held_out and (done or _due(run.progress.step, settings.eval_every)):
                last = _evaluate(run, metrics)
            if done or _due(run.progress.step, settings.save_every):
                _save(run)
    save_adapter(run.base, run.output / "adapter")
    seconds = time.monotonic() - started
    return Result(run.progress.step, loss, first, last, run.progress.best_step, peak_bytes(run.base.device), seconds)


def train_step(run: Run) -> dict[str, Any]:
    """One optimizer step; returns its line of metrics.

    The gradient is that of the mean over all learned tokens of the step, however they fall into micro-batches.
    Raises: Stopped: a signal came; the state before this step is saved.
    """
    started, step, settings = time.monotonic(), run.progress.step, run.recipe.train
    micro_batches = run.batches.step(step)
    learned = sum(batch.learned_tokens for batch in micro_batches)
    total = torch.zeros((), dtype=torch.float32, device=run.base.device)
    _set_training(run, True)
    for start in range(0, len(micro_batches), run.together):
        if run.stop:
            _stop(run)
        batches = micro_batches[start : start + run.together]
        keys = [(settings.seed, step, start + index) for index in range(len(batches))]
        loss = torch.stack(batch_losses(run.base, batches, run.chunk_tokens, keys)).sum()
        (loss / max(1, learned)).backward()
        total += loss.detach()
    trim_freed_memory()
    norm = clip(list(run.parameters.values()), settings.max_grad_norm)
    lr = learning_rate(step, total=run.total_steps, peak=settings.lr, warmup=settings.warmup, kind=settings.schedule)
    finite = bool(torch.isfinite(norm)) and bool(torch.isfinite(total))
    if finite:
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
    else:
        warn(f"step {step + 1}: loss {total.item()}, gradient norm {norm.item()}: the step is skipped")
        run.progress.skipped_steps += 1
    run.optimizer.zero_grad(set_to_none=True)
    trim_freed_memory()
    run.progress.step += 1
    run.progress.learned_tokens += learned
    seconds, tokens = time.monotonic() - started, sum(batch.tokens for batch in micro_batches)
    line = {
        "step": run.progress.step,
        "loss": total.item() / max(1, learned),
        "lr": lr,
        "grad_norm": norm.item(),
    }
    line |= {"tokens": tokens, "learned_tokens": learned, "tokens_per_s": tokens / seconds, "step_s": seconds}
    line |= {"device_peak_bytes": peak_bytes(run.base.device), "host_rss_bytes": resident_bytes()}
    if not finite:
        return line | {"skipped": True, "loss": None, "grad_norm": None}
    return line


def clip(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Scale the gradients in place so that their joint norm is at most `limit`; returns the norm before, fp32."""
    norms = torch.stack([parameter.grad.float().norm() for parameter in parameters if parameter.grad is not None])
    norm = norms.norm()
    if limit is not None and bool(norm > limit):
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(limit / norm)
    return norm


def _set_training(run: Run, mode: bool) -> None:
    """The frozen base always runs in eval mode (its own dropout is off); only the branches change."""
    for linear in run.base.linears().values():
        linear.branches.train(mode)


def _evaluate(run: Run, metrics: Metrics) -> Evaluation:
    """Held-out loss now; the adapter is kept in `best/` when it is the lowest so far."""
    evaluation = evaluate(run.base, run.held_out, run.chunk_tokens, run.together)
    progress = run.progress
    if progress.best_loss is None or evaluation.loss < progress.best_loss:
        progress.best_loss, progress.best_step = evaluation.loss, progress.step
        if progress.step > 0:
            save_adapter(run.base, run.output / "best")
    metrics.evaluation({"step": progress.step, "eval_loss": evaluation.loss, "eval_tokens": evaluation.tokens})
    return evaluation


def _save(run: Run) -> None:
    checkpoints = run.output / "checkpoints"
    save_checkpoint(checkpoints, run.progress, run.parameters, run.optimizer, run.identity)
    rotate(checkpoints, run.recipe.train.keep_checkpoints)


def _stop(run: Run) -> None:
    """Save the state before this step and end. Raises: Stopped."""
    run.optimizer.zero_grad(set_to_none=True)
    _save(run)
    number = run.stop.signal_number or 15
    raise Stopped(f"stopped by signal {number} after step {run.progress.step}; continue with --resume", number)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
