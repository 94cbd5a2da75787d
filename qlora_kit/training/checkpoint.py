"""Saved training state: written aside, its manifest last, renamed whole; verified byte by byte before it is used.

    checkpoints/step-000050/
      adapter.safetensors      the parameters, exactly
      optimizer.safetensors    their optimizer state, lower halves of master weights included
      state.json               step, best evaluation, plain numbers of the optimizer
      MANIFEST.json            format, step, identity of the run, size and sha256 of each file; written last

Why no random state: the order of samples and the dropout are pure functions of (seed, step, micro-batch).
A checkpoint of another run (recipe, data, base, kit's arithmetic) is refused by name of the field that differs.
Imported by: training.loop.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qlora_kit.base.shards import Shards, save_tensors
from qlora_kit.console import warn
from qlora_kit.errors import CheckpointError
from qlora_kit.files import atomic_folder, remove_folder, sha256, sweep, write_json
from qlora_kit.training.optim import optimizer_state, restore_optimizer_state

FORMAT = 1
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "MANIFEST.json"


@dataclass
class Progress:
    """Where a run stands, besides its tensors."""

    step: int = 0  # optimizer steps done
    best_loss: float | None = None
    best_step: int | None = None
    learned_tokens: int = 0
    skipped_steps: int = 0
    rows: int | None = None  # of a forward, one micro-batch at a time, since memory ran out; None: as the recipe says


def save_checkpoint(
    folder: Path,
    progress: Progress,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: dict[str, str],
) -> Path:
    """Write the state after `progress.step` steps below `folder`; a present one of that step is left as it is.

    Raises: DiskError: the disk refuses; nothing is left behind.
    """
    target = folder / f"step-{progress.step:06d}"
    if target.is_dir() and _damage(target) is None:
        return target
    if target.exists():
        remove_folder(target)
    tensors, numbers = optimizer_state(optimizer, parameters)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as aside:
        save_tensors(aside / FILES[0], dict(parameters))
        save_tensors(aside / FILES[1], tensors)
        write_json(aside / FILES[2], {"progress": vars(progress), "optimizer": numbers})
        files = {name: {"bytes": (aside / name).stat().st_size, "sha256": sha256(aside / name)} for name in FILES}
        manifest = {"format": FORMAT, "step": progress.step, "identity": identity, "files": files}
        write_json(aside / MANIFEST, manifest)
    return target


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, by step and never by clock, and what killed writers left."""
    sweep(folder)
    for old in _by_step(folder)[keep:]:
        remove_folder(old)


def load_checkpoint(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: dict[str, str],
) -> Progress:
    """Restore the newest undamaged checkpoint below `folder`; damaged ones are named and left where they are.

    Raises: CheckpointError: there is none, or it belongs to another run.
    """
    for candidate in _by_step(folder):
        if damage := _damage(candidate):
            warn(f"{damage}; trying the checkpoint before it")
            continue
        return _restore(candidate, parameters, optimizer, identity)
    raise CheckpointError(f"{folder}: no usable checkpoint to resume from; start without --resume")


def _by_step(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        listed = {name: (fields["bytes"], fields["sha256"]) for name, fields in manifest["files"].items()}
        if manifest["format"] != FORMAT or set(listed) != set(FILES):
            return f"{checkpoint / MANIFEST}: format {manifest['format']!r}, this version reads {FORMAT}"
        for name, (size_bytes, digest) in listed.items():
            path = checkpoint / name
            if path.is_symlink() or path.stat().st_size != size_bytes or sha256(path) != digest:
                return f"{path}: differs from {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        return f"{checkpoint}: cannot be read ({problem!r})"
    return None


def _restore(
    checkpoint: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: dict[str, str],
) -> Progress:
    saved_identity = json.loads((checkpoint / MANIFEST).read_text())["identity"]
    for field, value in identity.items():
        if saved_identity.get(field) != value:
            raise CheckpointError(
                f"{checkpoint}: {field} was {saved_identity.get(field)}, is {value}: this is another run; "
                "restore what it was, choose another output, or start without --resume"
            )
    state = json.loads((checkpoint / "state.json").read_text())
    weights = Shards([checkpoint / FILES[0]], CheckpointError)
    with torch.no_grad():
        for name, parameter in parameters.items():
            saved = weights.read(name)
            if saved.shape != parameter.shape or saved.dtype != parameter.dtype:
                raise CheckpointError(f"{checkpoint}: {name}: {list(saved.shape)} {saved.dtype} does not fit this run")
            parameter.copy_(saved)
    moments = Shards([checkpoint / FILES[1]], CheckpointError)
    tensors = {name: moments.read(name) for name in moments.entries}
    restore_optimizer_state(optimizer, parameters, tensors, state["optimizer"])
    return Progress(**state["progress"])
