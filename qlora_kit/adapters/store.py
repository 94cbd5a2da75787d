"""Adapters on disk, in PEFT's format: PEFT and vLLM load what is written here, and the reverse.

    adapter_config.json          PEFT's fields; only those named below are read, the rest is ignored
    adapter_model.safetensors    base_model.model.<linear>.lora_A.weight [R, I] and .lora_B.weight [O, R]
    qlora_kit.json               ours, beside them: the base's fingerprint and how it was quantized

Every adapter is checked when read: the exact set of names, shapes, finite values, and the base it was trained on.
Imported by: training, generation, export, the commands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit import __version__
from qlora_kit.adapters.inject import DEFAULT, activate, adapter_names, branches
from qlora_kit.adapters.lora import DropoutSeed, LoRABranch
from qlora_kit.base.loader import Base
from qlora_kit.base.shards import Shards, save_tensors
from qlora_kit.errors import ModelError
from qlora_kit.files import write_json

CONFIG, WEIGHTS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "qlora_kit.json"
PREFIX = "base_model.model."
RECORDED = {  # what `provenance` accepts
    "base_fingerprint": lambda value: isinstance(value, str),
    "quantization": lambda value: value in ("nf4", "fp4", "none"),
    "double_quant": lambda value: isinstance(value, bool),
    "dtype": lambda value: value in ("bfloat16", "float16", "float32"),
}
# PEFT's switches that change the product; each with the only value that means plain LoRA.
PLAIN = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "layer_replication": (None, []),
    "exclude_modules": (None, []),
    "target_parameters": (None, []),
}


def save_adapter(base: Base, folder: Path, name: str = DEFAULT, dtype: torch.dtype | None = None) -> None:
    """Write an adapter of `base` into `folder`.

    Args:
        dtype: of the file; default: that of the parameters.
    Raises: DiskError: the disk refuses. ModelError: the values are not finite.
    """
    adapter = branches(base, name)
    tensors: dict[str, Tensor] = {}
    for linear, branch in adapter.items():
        for leaf, parameter in (("lora_A", branch.lora_A), ("lora_B", branch.lora_B)):
            tensors[f"{PREFIX}{linear}.{leaf}.weight"] = parameter.detach().to(dtype or parameter.dtype)
    _require_finite(tensors, folder)
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, peft_config(base, adapter))
    record = {
        "qlora_kit": __version__,
        "base_fingerprint": base.fingerprint,
        "quantization": base.settings.quantization,
        "double_quant": base.settings.double_quant,
        "dtype": base.settings.dtype,
    }
    write_json(folder / PROVENANCE, record)


def peft_config(base: Base, adapter: dict[str, LoRABranch]) -> dict[str, Any]:
    """PEFT's description of an adapter. Ranks and scales that differ between linears go into its patterns."""
    ranks = {linear: branch.lora_A.shape[0] for linear, branch in adapter.items()}
    alphas = {linear: branch.scale * ranks[linear] for linear, branch in adapter.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    leaves = sorted({linear.rpartition(".")[2] for linear in adapter})
    everywhere = all(linear in adapter or linear.rpartition(".")[2] not in leaves for linear in base.linears())
    first = next(iter(adapter.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.settings.path,
        "revision": base.settings.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": first.dropout_probability,
        "target_modules": leaves if everywhere else sorted(adapter),
        "rank_pattern": {re.escape(linear): r for linear, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(linear): a for linear, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": base.architecture.transposed and base.settings.quantization == "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _most_common(values: dict[str, Any]) -> Any:
    counts = list(values.values())
    return max(dict.fromkeys(counts), key=counts.count)


@dataclass(frozen=True)
class StoredBranch:
    """One branch as the file holds it, on the host."""

    lora_A: Tensor  # [R, I]
    lora_B: Tensor  # [O, R]
    scale: float
    dropout: float


def load_adapter(
    base: Base, folder: Path, name: str = DEFAULT, *, any_base: bool = False, dtype: torch.dtype | None = None
) -> None:
    """Hang an adapter from disk on `base` under `name`, and make it the only active one.

    Args:
        any_base: accept an adapter whose recorded base is another one.
        dtype: of the parameters; default: that of the file.
    Raises: ModelError: what `read_adapter` and `require_same_base` find.
    """
    if name in adapter_names(base):
        raise ModelError(f"adapter {name!r} is already loaded on this base")
    linears = base.linears()
    shapes = {linear_name: (linear.out_features, linear.in_features) for linear_name, linear in linears.items()}
    stored = read_adapter(folder, shapes, base.folder)
    if not any_base:
        require_same_base(folder, base.fingerprint, base.folder)
    dropout_seed = DropoutSeed()
    for index, (linear_name, linear) in enumerate(linears.items()):
        if linear_name not in stored:
            continue
        branch = stored[linear_name]
        linear.branches[name] = LoRABranch(
            branch.lora_A.to(base.device, dtype or branch.lora_A.dtype),
            branch.lora_B.to(base.device, dtype or branch.lora_B.dtype),
            scale=branch.scale,
            dropout_probability=branch.dropout,
            dropout_seed=dropout_seed,
            index=index,
        ).eval()
    activate(base, [name])


def read_adapter(folder: Path, linears: Mapping[str, tuple[int, int]], base_folder: Path) -> dict[str, StoredBranch]:
    """The branches of an adapter folder, by linear.

    Args:
        linears: (out, in) features of every linear that a base has, by full name.
        base_folder: for messages.
    Raises: ModelError: no adapter there, not plain LoRA, or a name, shape or value that does not fit.
    """
    config, path = _read_config(folder), folder / WEIGHTS
    shards = Shards([path])
    pairs: dict[str, dict[str, Tensor]] = {}
    for key in shards.entries:
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight", key)
        if match is None or match[1] not in linears:
            raise ModelError(f"{path}: tensor {key!r} belongs to no linear of the decoder blocks of {base_folder}")
        pairs.setdefault(match[1], {})[match[2]] = shards.read(key)
    if not pairs:
        raise ModelError(f"{path}: holds no tensors: the adapter is empty")
    dropout = _number(config, "lora_dropout", 0.0, folder)
    branches = {}
    for name, pair in pairs.items():
        lora_A, lora_B = _checked_pair(pair, linears[name], f"{path}: {name}")
        branches[name] = StoredBranch(lora_A, lora_B, _scale(config, name, lora_A.shape[0], folder), dropout)
    return branches


def provenance(folder: Path) -> dict[str, Any]:
    """What this kit recorded beside an adapter; empty for one that PEFT made.

    Raises: ModelError: the file is there and cannot be read.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        return {}
    try:
        record = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as problem:
        raise ModelError(f"{path}: cannot read: {problem}") from problem
    for key, allowed in RECORDED.items():
        if key in record and not allowed(record[key]):
            raise ModelError(f"{path}: {key}: not a value that this kit writes: {record[key]!r:.80}")
    return record


def require_same_base(folder: Path, fingerprint: str, base_folder: Path) -> None:
    """Raises: ModelError: the adapter says that it was trained on another base."""
    trained_on = provenance(folder).get("base_fingerprint", fingerprint)
    if trained_on != fingerprint:
        raise ModelError(
            f"{folder / PROVENANCE}: trained on base {trained_on:.8}, {base_folder} is base {fingerprint:.8}; "
            "give the base it was trained on, or pass --any-base to use this one all the same"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{folder}: no {CONFIG}: this is not an adapter folder") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(f"{path}: cannot read: {problem}") from problem
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ModelError(f"{path}: peft_type: only LORA is supported, found {kind!r}")
    for key, plain in PLAIN.items():
        if key in config and config[key] not in plain:
            raise ModelError(f"{path}: {key}: only plain LoRA is supported, found {config[key]!r}")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder}: no {WEIGHTS}; pickled adapters (.bin) are not loaded, since they can run code")
    return config


def _pattern_matches(pattern: str, linear: str, folder: Path) -> bool:
    """PEFT's rule for `alpha_pattern`: the end of the name, at a dot."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", linear) is not None
    except re.error as problem:
        raise ModelError(f"{folder / CONFIG}: alpha_pattern: {pattern!r:.80}: {problem}") from problem


def _checked_pair(pair: dict[str, Tensor], linear: tuple[int, int], where: str) -> tuple[Tensor, Tensor]:
    """A and B. Raises: ModelError: one is missing, a shape does not fit the linear, or a value is not finite."""
    out_features, in_features = linear
    if len(pair) != 2:
        raise ModelError(f"{where}: only {next(iter(pair))} is there, a branch needs lora_A and lora_B")
    lora_A, lora_B = pair["lora_A"], pair["lora_B"]
    fits = lora_A.dim() == lora_B.dim() == 2 and lora_A.shape[1] == in_features
    if not fits or lora_B.shape != (out_features, lora_A.shape[0]):
        raise ModelError(
            f"{where}: lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)}, "
            f"this base takes [R, {in_features}] and [{out_features}, R]"
        )
    _require_finite(pair, where)
    return lora_A, lora_B


def _require_finite(tensors: dict[str, Tensor], where: Path | str) -> None:
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ModelError(f"{where}: tensor {key!r} holds NaN or infinity")


def _number(fields: Mapping[str, Any], key: str, default: float, folder: Path) -> float:
    """A field that is a number from 0 to 1e9; null counts as absent. Raises: ModelError: it is something else."""
    value = default if fields.get(key) is None else fields[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise ModelError(f"{folder / CONFIG}: {key}: a number from 0 expected, found {value!r:.80}")
    return float(value)


def _scale(config: dict[str, Any], linear: str, rank: int, folder: Path) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    alpha = _number(config, "lora_alpha", 8, folder)
    patterns = config.get("alpha_pattern") or {}
    for pattern in patterns:
        if _pattern_matches(pattern, linear, folder):
            alpha = _number(patterns, pattern, alpha, folder)
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
