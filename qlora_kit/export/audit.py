"""What a merged folder must be, tensor by tensor: every target changed by what the adapter says, nothing else at all.

Why beside the scores: a fault in one small layer hardly moves a loss, and shows here in its bits. How: targets are
taken from the adapter file's own names; a sample of each one's rows is computed again, plainly, and compared.
Imported by: verify.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit.adapters.store import PREFIX, WEIGHTS, StoredBranch
from qlora_kit.base.shards import Shards, find_shards
from qlora_kit.errors import ModelError
from qlora_kit.export.merge import Merge

SAMPLED_ROWS = 8
INEXACT_SHARE = 1e-3  # of sampled elements: torch rounds fp64 to fp16 twice


def audit(folder: Path, merge: Merge) -> dict[str, int]:
    """Compare a merged folder with its base and adapter, bit by bit.

    Returns: how many tensors `changed` and are `unchanged`.
    Raises: ModelError: names the first tensor, or the field of config.json, that is not as it must be.
    """
    _audit_config(folder, merge)
    merged, base = Shards(find_shards(folder)), merge.weights
    if merged.entries.keys() != base.entries.keys():
        other = min(merged.entries.keys() ^ base.entries.keys())
        raise ModelError(f"{folder}: tensor {other!r} is in only one of base and merged model; do not use it")
    targets = _targets(merge.adapter)
    counts = {"changed": 0, "unchanged": 0}
    for name in merged.entries:
        before, after = base.read(name), merged.read(name)
        target = merge.linear(name) in targets and name.endswith(".weight")
        changed = not torch.equal(_rounded(before, merge.dtype), after)
        if target != changed:
            raise ModelError(f"{folder}: tensor {name!r} {_fault(target, merge)}; do not use it")
        if target:
            branch = merge.branches[merge.linear(name)]
            _audit_rows(f"{folder}: tensor {name!r}", before, after, branch, merge.base.shapes.architecture.transposed)
        counts["changed" if changed else "unchanged"] += 1
    return counts


def _targets(adapter: Path) -> set[str]:
    """Linears that the adapter's file names."""
    pattern = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight")
    return {match[1] for name in Shards([adapter / WEIGHTS]).entries if (match := pattern.fullmatch(name))}


def _fault(target: bool, merge: Merge) -> str:
    if not target:
        return "is not the base's, and the adapter does not name it"
    return (
        f"is the base's: the adapter's update is zero, or smaller than half a step of {merge.dtype} everywhere "
        "(then use --dtype float32)"
    )


def _audit_config(folder: Path, merge: Merge) -> None:
    """Raises: ModelError: config.json differs from the base's in more than dtype and quantization."""
    ignored = ("dtype", "torch_dtype", "quantization_config")
    found = json.loads((folder / "config.json").read_text())
    if "quantization_config" in found:
        raise ModelError(f"{folder / 'config.json'}: quantization_config: the merged weights are not quantized")
    for key in sorted((found.keys() | merge.base.config.keys()) - set(ignored)):
        if found.get(key) != merge.base.config.get(key):
            raise ModelError(
                f"{folder / 'config.json'}: {key}: {found.get(key)!r:.80}, the base has "
                f"{merge.base.config.get(key)!r:.80}; do not use it"
            )


def _audit_rows(where: str, before: Tensor, after: Tensor, branch: StoredBranch, transposed: bool) -> None:
    """Raises: ModelError: sampled rows are not base + scale B A, rounded."""
    before, after = (value.t() if transposed else value for value in (before, after))
    rows = torch.linspace(0, len(after) - 1, min(SAMPLED_ROWS, len(after))).long()
    update = branch.scale * (branch.lora_B[rows].double() @ branch.lora_A.double())
    exact = before[rows].double() + update
    inexact = (exact.to(after.dtype) != after[rows]).double().mean().item()
    if inexact > INEXACT_SHARE:
        raise ModelError(
            f"{where}: {inexact:.1%} of sampled elements are not base + {branch.scale:g} B A; do not use it"
        )


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
