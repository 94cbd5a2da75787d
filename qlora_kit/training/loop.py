"""The one training loop, top to bottom: prepare a run (`run`), then for each optimizer step its micro-batches.

A step is a pure function of (recipe, base, data, state after the step before): sample order and dropout come from
(seed, step, micro-batch), the learning rate from the step. So a resumed run is, bit for bit,
the run that was not stopped.
Imported by: the `train` command, the quickstart, tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit import files
from qlora_kit.adapters.inject import DEFAULT
from qlora_kit.adapters.lora import LoRABranch
from qlora_kit.adapters.store import save_adapter
from qlora_kit.base.device import (
    peak_bytes,
    pick_device,
    reset_peak,
    resident_bytes,
    return_freed_memory,
    trim_freed_memory,
)
from qlora_kit.base.owners import mark, owner
from qlora_kit.console import note, warn
from qlora_kit.data.batches import MicroBatch, split
from qlora_kit.errors import NonFiniteError, RecipeError, Stopped
from qlora_kit.recipe import Recipe
from qlora_kit.training.calibrate import calibrate_by_run
from qlora_kit.training.checkpoint import load_checkpoint, rotate, save_checkpoint
from qlora_kit.training.evaluate import Evaluation, evaluate
from qlora_kit.training.loss import batch_losses
from qlora_kit.training.memory import explained, interpreter_bytes, write_memory
from qlora_kit.training.metrics import Metrics, open_metrics, read_lines
from qlora_kit.training.report import write_report
from qlora_kit.training.run import Run, choose_heap, make_gradients, prepare
from qlora_kit.training.schedule import learning_rate
from qlora_kit.training.signals import stop_on_signal
from qlora_kit.training.smaller import repeat_smaller

NON_FINITE_LIMIT = 5  # steps in a row that may be skipped
Step = Callable[[Run], dict[str, Any]]  # one optimizer step of a run -> its line of metrics


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


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    restart: bool = False,
    plan: dict[str, Any] | None = None,
    first_step: Step | None = None,
) -> Result:
    """Train the adapter of a recipe and save it under `output`.

    Args:
        resume: continue from the newest checkpoint below `output`.
        restart: throw away the run that `output` holds.
        plan: what `plan --json` says of this recipe; kept in the run's folder beside what is measured.
        first_step: makes the first step in `train_step`'s place, to measure it (`profiling.profiler.followed_step`).
    Raises: every error of `qlora_kit.errors` that the user's files can cause; Stopped: a signal came, state is saved.
    """
    output = Path(recipe.output)
    with files.lock(output), stop_on_signal() as stop:
        _require_unclaimed(output, resume or restart)
        for folder in (output, output / "adapter", output / "best"):
            files.sweep(folder)
        before_bytes = interpreter_bytes(recipe)
        if plan is None:
            return_freed_memory()
        else:
            choose_heap(pick_device(recipe.train.device), plan["roomy"])
        run = prepare(recipe, stop)
        if resume:
            run.progress = load_checkpoint(output / "checkpoints", run.parameters, run.optimizer, run.identity)
            note(f"resumed after step {run.progress.step} of {run.total_steps}")
        elif restart:
            _remove_run(output)
        files.write_text(output / "recipe.yaml", recipe.to_yaml())
        files.write_json(output / "plan.json", plan)
        with explained(run):
            if run.progress.step == 0:
                rehearse(run)
            result = _steps(run, first_step or train_step)
        write_memory(output / "memory.json", plan, run, before_bytes)
        lines = read_lines(output)
        write_report(output, lines)
        if plan is not None:
            calibrate_by_run(run, plan["components"], lines)
        return result


def _present(output: Path) -> list[Path]:
    """What a run has left in its folder."""
    names = ("checkpoints", "adapter", "best", "metrics.jsonl", "memory.json", "report.html")
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


def _steps(run: Run, make_step: Step) -> Result:
    """From `run.progress` to the last step; `make_step` makes the first of them."""
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
            line, make_step = make_step(run), train_step
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


def rehearse(run: Run) -> None:
    """Take the longest rows forward and backward before the first step and forget their gradients.

    So what is to run out of memory does so now, not after hours; no bit of the run depends on it. It is one group of
    micro-batches, which finds gradients of zero where others would come before it. None where step 1 comes at once and
    has a group of that shape, as with packed rows. Evaluations begin with their longest rows, the first before step 1.
    """
    step, longest = run.batches.step(0), run.batches.worst()
    group = longest[: run.together]
    groups = [_shapes(step[start : start + run.together]) for start in range(0, len(step), run.together)]
    if _shapes(group) in groups and not run.held_out:
        return
    note(f"first the longest rows, to see that they fit: {len(group)} micro-batch(es) of {_shapes(group)[0]} tokens")

    def forward_and_backward() -> None:
        if len(longest) > len(group):
            make_gradients(run)
        _gradients(run, group)

    repeat_smaller(run, forward_and_backward)
    run.optimizer.zero_grad(set_to_none=True)
    trim_freed_memory()


def _shapes(group: list[MicroBatch]) -> list[str]:
    """ "rows x tokens" of each, in whatever order they pass."""
    return sorted(" x ".join(map(str, batch.input_ids.shape)) for batch in group)


def train_step(run: Run) -> dict[str, Any]:
    """One optimizer step; returns its line of metrics.

    The gradient is that of the mean over all learned tokens of the step, however they fall into micro-batches.
    Raises: Stopped: a signal came; the state before this step is saved.
    """
    started, step, settings = time.monotonic(), run.progress.step, run.recipe.train
    micro_batches = run.batches.step(step)
    learned = sum(batch.learned_tokens for batch in micro_batches)
    total = repeat_smaller(run, lambda: _gradients(run, micro_batches))
    mark("optimizer")
    trim_freed_memory()
    norm = clip(list(run.parameters.values()), settings.max_grad_norm)
    lr = learning_rate(step, total=run.total_steps, peak=settings.lr, warmup=settings.warmup, kind=settings.schedule)
    finite = bool(torch.isfinite(norm)) and bool(torch.isfinite(total))
    if finite:
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        with owner("optimizer"):
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
    if run.progress.rows is not None:
        line["micro_batch"] = run.rows
    if not finite:
        return line | {"skipped": True, "loss": None, "grad_norm": None}
    return line


def _gradients(run: Run, micro_batches: list[MicroBatch]) -> Tensor:
    """Add the gradient of their mean loss into `.grad`; returns the summed loss, a scalar on the device.

    Raises: Stopped: a signal came.
    """
    learned = sum(batch.learned_tokens for batch in micro_batches)
    total = torch.zeros((), dtype=torch.float32, device=run.base.device)
    parts, step = split(micro_batches, run.rows), run.progress.step
    _set_training(run, True)
    for start in range(0, len(parts), run.together):
        if run.stop:
            _stop(run)
        mark("embedding")
        batches = parts[start : start + run.together]
        keys = [(run.recipe.train.seed, step, start + index) for index in range(len(batches))]
        loss = torch.stack(batch_losses(run.base, batches, run.chunk_tokens, keys)).sum()
        mark("head backward")
        (loss / max(1, learned)).backward()
        total += loss.detach()
    return total


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
    for trained in run.base.updates.get(DEFAULT, {}).values():
        if isinstance(trained, LoRABranch):
            trained.train(mode)


def _evaluate(run: Run, metrics: Metrics) -> Evaluation:
    """Held-out loss now; the adapter is kept in `best/` when it is the lowest so far."""
    evaluation = repeat_smaller(
        run, lambda: evaluate(run.base, split(run.held_out, run.rows), run.chunk_tokens, run.together)
    )
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
