"""What a merged folder must be, tensor by tensor: every target changed by what the adapter says, nothing else at all.

Why beside the scores: a fault in one small layer hardly moves a loss, and shows here in its bits. How: targets are
taken from the adapter file's own names; a sample of each one's rows is computed again, plainly, and compared. Of a
model that was quantized again whole tensors are, since their scales depend on every row.
Imported by: verify.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit.adapter_files import PAIR, WEIGHTS
from qlora_kit.adapters.updates import StoredBranch, TensorUpdate
from qlora_kit.base.shards import Shards, find_shards
from qlora_kit.errors import ModelError
from qlora_kit.export.merge import Merge
from qlora_kit.export.onto import BaseFiles
from qlora_kit.export.rounding import round_once
from qlora_kit.export.tables import CHUNK_ROWS

SAMPLED_ROWS = 8
INEXACT_SHARE = 1e-3  # of sampled elements: sums in another order


def audit(folder: Path, merge: Merge) -> dict[str, int]:
    """Compare a merged folder with its base and adapter, bit by bit.

    Returns: how many tensors `changed` and are `unchanged`.
    Raises: ModelError: names the first tensor, or the field of config.json, that is not as it must be.
    """
    _audit_config(folder, merge)
    merged, base = _opened(folder, merge), merge.weights
    trained = merge.base.weights("dequantized", merge.quantization) if merge.requantized else base
    wanted = merge.layout.entries.keys() if merge.requantized is None else set(merge.requantized.names)
    if other := merged.entries.keys() ^ wanted:
        raise ModelError(f"{folder}: tensor {min(other)!r} is in only one of base and merged model; do not use it")
    targets = _targets(merge.adapter)
    counts = {"changed": 0, "unchanged": 0}
    for name in merged.entries:
        before, after = base.read(merge.layout.sources.get(name, name)), merged.read(name)
        if isinstance(update := merge.update(name), TensorUpdate):
            _audit_tensor(f"{folder}: tensor {name!r}", before, after, update)
            counts["changed"] += 1
            continue
        target = merge.linear(name) in targets and name.endswith(".weight")
        stays = before if trained is base else trained.read(merge.layout.sources.get(name, name))
        changed = not torch.equal(_rounded(stays, merge.dtype), after)
        lost_in_rounding = target and not changed and merge.requantized is not None  # in evidence, and no fault
        if target != changed and not lost_in_rounding:
            raise ModelError(f"{folder}: tensor {name!r} {_fault(target, merge)}; do not use it")
        if target:
            _audit_target(f"{folder}: tensor {name!r}", before, after, merge, merge.linear(name))
        counts["changed" if changed else "unchanged"] += 1
    return counts


def _opened(folder: Path, merge: Merge) -> Shards:
    """The folder's tensors, dequantized if they were quantized again. Raises: ModelError: a state that is not valid."""
    if merge.requantized is None:
        return Shards(find_shards(folder))
    return BaseFiles.open(folder).weights("dequantized", merge.quantization)


def _targets(adapter: Path) -> set[str]:
    """Linears that the adapter's file names."""
    return {match[1] for name in Shards([adapter / WEIGHTS]).entries if (match := PAIR.fullmatch(name))}


def _fault(target: bool, merge: Merge) -> str:
    if not target:
        return "is not the base's, and the adapter does not name it"
    return (
        f"is the base's: the adapter's update is zero, or smaller than half a step of {merge.dtype} everywhere "
        "(then use --dtype float32)"
    )


def _audit_config(folder: Path, merge: Merge) -> None:
    """Raises: ModelError: config.json differs from the base's in more than dtype and quantization."""
    ignored, wanted = ("dtype", "torch_dtype", "quantization_config"), merge.base.config | merge.layout.config
    found = json.loads((folder / "config.json").read_text())
    packed = merge.requantized.config if merge.requantized else {}
    if found.get("quantization_config") != packed.get("quantization_config"):
        state = f"as {merge.quantization.quant_type}" if packed else "not at all"
        raise ModelError(f"{folder / 'config.json'}: quantization_config: the merged weights are quantized {state}")
    for key in sorted((found.keys() | wanted.keys()) - set(ignored)):
        if found.get(key) != wanted.get(key):
            raise ModelError(
                f"{folder / 'config.json'}: {key}: {found.get(key)!r:.80}, the base has "
                f"{wanted.get(key)!r:.80}; do not use it"
            )


def _audit_target(where: str, before: Tensor, after: Tensor, merge: Merge, linear: str) -> None:
    """Raises: ModelError: a linear's weight is not what the adapter makes of the base's."""
    if merge.base.shapes.architecture.transposed:
        before, after = before.t(), after.t()
    branch = merge.changes.branches[linear]
    if merge.requantized is None:
        _audit_rows(where, before, after, branch)
        return
    exact = round_once(branch.apply(before.double()), merge.dtype)
    inexact = (merge.quantization.through(exact) != after).double().mean().item()
    if not inexact <= INEXACT_SHARE:
        raise ModelError(f"{where}: {inexact:.1%} of it is not base + {branch.scale:g} B A quantized; do not use it")


def _audit_rows(where: str, before: Tensor, after: Tensor, branch: StoredBranch) -> None:
    """Raises: ModelError: sampled rows are not base + scale B A, rounded."""
    rows = torch.linspace(0, len(after) - 1, min(SAMPLED_ROWS, len(after))).long()
    update = branch.scale * (branch.lora_B[rows].double() @ branch.lora_A.double())
    exact = before[rows].double() + update
    if branch.magnitude is not None:
        exact *= (branch.magnitude[rows].double() / exact.norm(dim=1))[:, None]
    inexact = (round_once(exact, after.dtype) != after[rows]).double().mean().item()
    if inexact > INEXACT_SHARE:
        raise ModelError(
            f"{where}: {inexact:.1%} of sampled elements are not base + {branch.scale:g} B A; do not use it"
        )


def _audit_tensor(where: str, before: Tensor, after: Tensor, update: TensorUpdate) -> None:
    """Raises: ModelError: not what the adapter has in the place of a tensor outside the linears."""
    inexact = 0
    for start in range(0, len(after), CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(after))
        exact = update.rows(start, stop).apply(before[start:stop].double())
        inexact += int((round_once(exact, after.dtype) != after[start:stop]).sum())
    if len(after) != update.height(len(before)) or inexact > INEXACT_SHARE * after.numel():
        raise ModelError(f"{where}: {inexact} elements are not what the adapter has there; do not use it")


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
