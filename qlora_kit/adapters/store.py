"""Adapters on disk, in PEFT's format: PEFT and vLLM load what is written here, and the reverse.

    adapter_config.json          PEFT's fields; only those named below are read, the rest is ignored
    adapter_model.safetensors    base_model.model.<linear>.lora_A.weight [R, I] and .lora_B.weight [O, R], and
                                 the other names in `adapters.parts`
    qlora_kit.json               ours, beside them: the base's fingerprint and how it was quantized

Every adapter is checked when read: the exact set of names, shapes, finite values, and the base it was trained on.
Imported by: training, generation, export, the commands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit import __version__, recipe
from qlora_kit.adapter_files import CONFIG, PREFIX, WEIGHTS, trainable
from qlora_kit.adapters.inject import DEFAULT, activate, adapter_names, branches
from qlora_kit.adapters.lora import DropoutSeed, LoRABranch
from qlora_kit.adapters.parts import Known, known_of, read_parts, require_finite
from qlora_kit.adapters.tables import TrainedTable
from qlora_kit.adapters.tensors import tensor_of, trained_tensor
from qlora_kit.adapters.updates import StoredAdapter, StoredBranch, TensorUpdate
from qlora_kit.base.loader import Base
from qlora_kit.base.shards import save_tensors
from qlora_kit.base.vocabulary import ResidentTable, Table
from qlora_kit.errors import ModelError
from qlora_kit.files import write_json
from qlora_kit.planning.components import LOSS_CHUNK_VOCABULARY
from qlora_kit.planning.shapes import ModelShapes, matches, model_shapes, read_config
from qlora_kit.planning.trained import trained_whole

PROVENANCE = "qlora_kit.json"
RECORDED = {  # what `provenance` accepts
    "base_fingerprint": lambda value: isinstance(value, str),
    "quantization": lambda value: value in ("nf4", "fp4", "none"),
    "double_quant": lambda value: isinstance(value, bool),
    "dtype": lambda value: value in ("bfloat16", "float16", "float32"),
}


def save_adapter(base: Base, folder: Path, name: str = DEFAULT, dtype: torch.dtype | None = None) -> None:
    """Write an adapter of `base` into `folder`.

    Args:
        dtype: of the file; default: that of the parameters.
    Raises: DiskError: the disk refuses. ModelError: the values are not finite.
    """
    adapter, updates = branches(base, name), base.updates.get(name, {})
    if any(isinstance(update, TensorUpdate) for update in updates.values()) or any(
        branch.magnitude is not None for branch in adapter.values()
    ):
        raise ModelError(f"adapter {name!r}: only what was trained here is written, this one holds more")
    adapter |= {key.removesuffix(".weight"): found for key, found in updates.items() if isinstance(found, LoRABranch)}
    whole = {key: found for key, found in updates.items() if not isinstance(found, LoRABranch)}
    tensors = {key: value for module, branch in adapter.items() for key, value in _pair(base, module, branch).items()}
    for key, found in whole.items():
        tensors[f"{PREFIX}{key}"] = found.weight if isinstance(found, TrainedTable) else found.detach()
    tensors = {key: value.to(dtype or value.dtype).contiguous() for key, value in tensors.items()}
    require_finite(tensors, folder)
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, peft_config(base, adapter, [key.rpartition(".")[0] for key in whole]))
    record = {
        "qlora_kit": __version__,
        "base_fingerprint": base.fingerprint,
        "quantization": base.settings.quantization,
        "double_quant": base.settings.double_quant,
        "dtype": base.settings.dtype,
    }
    write_json(folder / PROVENANCE, record)


def _pair(base: Base, module: str, branch: LoRABranch) -> dict[str, Tensor]:
    """A and B by PEFT's names; of an embedding they are those of its transpose."""
    lora_A, lora_B = branch.lora_A.detach(), branch.lora_B.detach()
    if module == base.architecture.embedding:
        return {f"{PREFIX}{module}.lora_embedding_A": lora_B.t(), f"{PREFIX}{module}.lora_embedding_B": lora_A.t()}
    return {f"{PREFIX}{module}.lora_A.weight": lora_A, f"{PREFIX}{module}.lora_B.weight": lora_B}


def peft_config(base: Base, adapter: dict[str, LoRABranch], saved: Sequence[str] = ()) -> dict[str, Any]:
    """PEFT's description of an adapter of `base`.

    Args:
        adapter: its branches by linear, or by embedding and head.
        saved: modules that it holds whole.
    """
    ranks = {linear: branch.lora_A.shape[0] for linear, branch in adapter.items()}
    alphas = {linear: branch.scale * ranks[linear] for linear, branch in adapter.items()}
    leaves = sorted({linear.rpartition(".")[2] for linear in adapter})
    everywhere = all(linear in adapter or linear.rpartition(".")[2] not in leaves for linear in base.linears())
    first = next(iter(adapter.values()))
    return lora_config(ranks, alphas) | {
        "base_model_name_or_path": base.settings.path,
        "revision": base.settings.revision,
        "lora_dropout": first.dropout_probability,
        "target_modules": leaves if everywhere else sorted(adapter),
        "modules_to_save": sorted(set(saved)) or None,
        "fan_in_fan_out": base.architecture.transposed and base.settings.quantization == "none",
    }


def lora_config(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """PEFT's description of plain LoRA with these ranks and alphas by linear, without a word on base and targets.

    What differs between linears goes into its patterns.
    """
    rank, alpha = _most_common(ranks), _most_common(alphas)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": [],
        "rank_pattern": {re.escape(linear): r for linear, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(linear): a for linear, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _most_common(values: Mapping[str, Any]) -> Any:
    counts = list(values.values())
    return max(dict.fromkeys(counts), key=counts.count)


def load_adapter(
    base: Base, folder: Path, name: str = DEFAULT, *, any_base: bool = False, dtype: torch.dtype | None = None
) -> DropoutSeed:
    """Hang an adapter from disk on `base` under `name`, and make it the only active one.

    Args:
        any_base: accept an adapter whose recorded base is another one.
        dtype: of the parameters; default: that of the file.
    Returns: the seed of its dropout.
    Raises: ModelError: what `read_whole_adapter` and `require_same_base` find.
    """
    if name in adapter_names(base):
        raise ModelError(f"adapter {name!r} is already loaded on this base")
    stored = read_whole_adapter(folder, model_shapes(*read_config(str(base.folder))), base.folder)
    if not any_base:
        require_same_base(folder, base.fingerprint, base.folder)
    dropout_seed = _hang(base, stored, name, dtype)
    base.updates[name] = stored.tensors
    activate(base, [name])
    return dropout_seed


def _hang(base: Base, stored: StoredAdapter, name: str, dtype: torch.dtype | None) -> DropoutSeed:
    """Give the linears their branches; returns the seed of their dropout."""
    dropout_seed = DropoutSeed()
    for index, (linear_name, linear) in enumerate(base.linears().items()):
        if linear_name in stored.branches:
            linear.branches[name] = _branch(base, stored.branches[linear_name], index, dropout_seed, dtype)
    return dropout_seed


def _branch(
    base: Base, branch: StoredBranch, index: int, dropout_seed: DropoutSeed, dtype: torch.dtype | None
) -> LoRABranch:
    return LoRABranch(
        branch.lora_A.to(base.device, dtype or branch.lora_A.dtype).contiguous(),
        branch.lora_B.to(base.device, dtype or branch.lora_B.dtype).contiguous(),
        scale=branch.scale,
        dropout_probability=branch.dropout,
        dropout_seed=dropout_seed,
        index=index,
        magnitude=None if branch.magnitude is None else branch.magnitude.to(base.device),
    ).eval()


def continue_adapter(base: Base, settings: recipe.Adapter) -> DropoutSeed:
    """Hang in the adapter of `adapter.start_from`, to be trained on with its ranks and scales and the recipe's dropout.

    Raises: ModelError: what `trainable`, `read_whole_adapter` and `require_same_base` find, or the recipe was read with
        another adapter.
    """
    folder, dtype = Path(str(settings.start_from)), getattr(torch, settings.dtype)
    trainable(folder)
    shapes = model_shapes(*read_config(str(base.folder)))
    stored = read_whole_adapter(folder, shapes, base.folder)
    require_same_base(folder, base.fingerprint, base.folder)
    _require_as_read(folder, stored, settings, shapes)
    seed = _hang(base, stored, DEFAULT, dtype)
    updates = {name: _to_train(base, name, update, seed, dtype) for name, update in stored.tensors.items()}
    base.updates[DEFAULT] = updates
    activate(base, [DEFAULT])
    for hung in (*branches(base).values(), *(found for found in updates.values() if isinstance(found, LoRABranch))):
        hung.dropout_probability = settings.dropout
    return seed


def _require_as_read(folder: Path, stored: StoredAdapter, settings: recipe.Adapter, shapes: ModelShapes) -> None:
    """Raises: ModelError: the adapter trains something else than the recipe says, which the plan did not count."""
    saved = trained_whole(shapes, settings.modules_to_save)
    ranks = {name: len(branch.lora_A) for name, branch in stored.branches.items()}
    for name, update in stored.tensors.items():
        if update.branch is not None:
            ranks[name.removesuffix(".weight")] = len(update.branch.lora_A)
        elif name not in saved:
            raise ModelError(f"{folder}: {name} is not what the recipe was read with; start again")
    for name, rank in ranks.items():
        if rank > settings.rank or not matches(name, settings.target_modules):
            raise ModelError(f"{folder}: {name} of rank {rank} is not what the recipe was read with; start again")


def _to_train(base: Base, name: str, update: TensorUpdate, seed: DropoutSeed, dtype: torch.dtype) -> Any:
    """What is trained on of a tensor outside the linears of the blocks.

    Raises: ModelError: it has more rows than the base's, or below its branch other values.
    """
    own, value = tensor_of(base, name), update.value
    if value is not None and tuple(value.shape) != tuple(own.shape):
        raise ModelError(
            f"{name}: {len(value)} rows, the base has {own.shape[0]}: added tokens are not trained here; this adapter "
            "runs (generate, eval) and merges"
        )
    if update.branch is None:
        return trained_tensor(base, name, value)
    table = own if isinstance(own, Table) else ResidentTable(own)
    for start, rows in table.chunks(LOSS_CHUNK_VOCABULARY):
        if value is not None and not torch.equal(value[start : start + len(rows)].to(rows), rows):
            raise ModelError(
                f"{name}: this adapter was trained on other values of it than this base has; give the base that it was "
                "trained on"
            )
    index = len(base.linears()) + (name == f"{base.architecture.head}.weight")
    return _branch(base, update.branch, index, seed, dtype)


def read_adapter(folder: Path, linears: Mapping[str, tuple[int, int]], base_folder: Path) -> dict[str, StoredBranch]:
    """The branches of an adapter that is nothing but LoRA on the linears of the blocks.

    Args:
        linears: (out, in) features of every linear that a base has, by full name.
        base_folder: for messages.
    Raises: ModelError: what `read_whole_adapter` finds, or the adapter holds more than that.
    """
    found = read_parts(folder, Known(base_folder, linears))
    if not found.is_plain:
        raise ModelError(f"{folder / CONFIG}: use_dora: only plain LoRA can be used for this; DoRA runs and merges")
    return found.branches


def read_whole_adapter(folder: Path, shapes: ModelShapes, base_folder: Path) -> StoredAdapter:
    """All that an adapter folder holds: branches, DoRA's magnitudes, and what it makes of other tensors.

    Raises: ModelError: no adapter there, of a kind that is not built, or a name, shape or value that does not fit.
    """
    return read_parts(folder, known_of(shapes, base_folder))


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
