"""From the tensors of an adapter's file to what each of them is: PEFT's names, taken apart and checked.

    <linear>.lora_A.weight [R, I], .lora_B.weight [O, R], .lora_magnitude_vector [O]      LoRA and DoRA; the head too
    <embedding>.lora_embedding_A [R, V], .lora_embedding_B [D, R]                         LoRA on an embedding
    <module>.token_adapter.trainable_tokens_delta [n, D]                                  values of some rows
    <module>.weight, .bias, .base_layer.weight, .base_layer.bias                          `modules_to_save`, `bias`

Only what is in the file counts; the config gives scales and the ids of the rows. What belongs nowhere is an error.
Imported by: adapters.store.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.adapter_files import CONFIG, PREFIX, WEIGHTS, number, read_config, scale_of
from qlora_kit.adapters.updates import StoredAdapter, StoredBranch, TensorUpdate
from qlora_kit.base.shards import Shards
from qlora_kit.errors import ModelError
from qlora_kit.planning.shapes import ModelShapes

LEAVES = {  # the end of a name in the file -> what it is here
    r"lora_A\.weight": "lora_A",
    r"lora_B\.weight": "lora_B",
    r"lora_magnitude_vector(?:\.weight)?": "magnitude",
    r"lora_embedding_A": "embedding_A",
    r"lora_embedding_B": "embedding_B",
    r"token_adapter\.trainable_tokens_delta": "rows",
    r"(?:base_layer\.)?weight": "weight",
    r"(?:base_layer\.)?bias": "bias",
}
KEYS = [(re.compile(rf"{re.escape(PREFIX)}(.+?)\.{end}"), leaf) for end, leaf in LEAVES.items()]
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Known:
    """What a base has, for an adapter to change.

    Attributes:
        linears: (out, in) features of the linears of its blocks, by name.
        tensors: shape of every other tensor, the head of a tied model included; empty: these may not be changed.
        tied: head and embedding are one tensor.
        renamed: old name of a tensor -> the model's.
    """

    base_folder: Path
    linears: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    embedding: str = ""
    head: str = ""
    tied: bool = False
    renamed: Callable[[str], str | None] = lambda name: name


def known_of(shapes: ModelShapes, base_folder: Path) -> Known:
    """All that an adapter may change of a model of these shapes."""
    row, tensors = shapes.architecture, {name: tuple(shape) for name, shape in shapes.tensors}
    tensors[f"{row.head}.weight"] = tensors[f"{row.embedding}.weight"]
    linears = linear_shapes(shapes)
    return Known(base_folder, linears, tensors, row.embedding, row.head, shapes.tied, row.name_in_model)


def linear_shapes(shapes: ModelShapes) -> dict[str, tuple[int, int]]:
    """(out, in) features of every linear of the blocks, by full name."""
    return {
        f"{shapes.architecture.blocks}.{layer}.{linear.name}": (linear.out_features, linear.in_features)
        for layer in range(shapes.layers)
        for linear in shapes.linears
    }


def read_parts(folder: Path, known: Known) -> StoredAdapter:
    """All that an adapter folder holds.

    Raises: ModelError: no adapter there, of a kind that is not built, or a name, shape or value that does not fit.
    """
    reader = _Reader(folder, read_config(folder), known)
    modules = reader.modules()
    branches, tensors = dict[str, StoredBranch](), dict[str, TensorUpdate]()
    for module, parts in modules.items():
        if module in known.linears:
            branches |= reader.branch_of_linear(module, parts)
        tensors |= reader.tensors_of(module, parts)
        if parts:
            raise reader.refused(f"{module}: {sorted(parts)[0]}")
    reader.require_whole(tensors)
    embedding, head = f"{known.embedding}.weight", f"{known.head}.weight"
    if known.tied and embedding in tensors and head not in tensors and tensors[embedding].listed is not None:
        tensors[head] = TensorUpdate(listed=tensors[embedding].listed)  # PEFT's rule: rows of tied tables stay tied
    return StoredAdapter(branches, tensors)


def require_finite(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raises: ModelError: one of them holds NaN or infinity."""
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ModelError(f"{where}: tensor {key!r} holds NaN or infinity")


def _taken(parts: Parts) -> Parts:
    """What belongs to a branch, taken out of `parts`."""
    names: tuple[str, ...] = ("lora_A", "lora_B", "magnitude")
    return {leaf: parts.pop(leaf) for leaf in names if leaf in parts}


@dataclass(frozen=True)
class _Reader:
    folder: Path
    config: dict[str, Any]
    known: Known

    @property
    def path(self) -> Path:
        return self.folder / WEIGHTS

    def refused(self, what: str) -> ModelError:
        return ModelError(
            f"{self.path}: {what} belongs to no linear of the decoder blocks of {self.known.base_folder}, "
            "nor to another tensor that an adapter can change here"
        )

    def require_whole(self, tensors: Mapping[str, TensorUpdate]) -> None:
        """Raises: ModelError: a module that the config names is not in the file, or the head has not its tokens."""
        for name in self.config.get("modules_to_save") or []:
            module = next((known for known in self.known.tensors if f".{known}".endswith(f".{name}.weight")), None)
            if module is not None and module not in tensors:
                raise ModelError(f"{self.path}: modules_to_save names {name!r} in {CONFIG}, but {module!r} is missing")

        vocabulary = {
            name: tensors.get(name, TensorUpdate()).height(self.known.tensors[name][0])
            for name in (f"{self.known.embedding}.weight", f"{self.known.head}.weight")
            if name in self.known.tensors
        }
        if len(set(vocabulary.values())) > 1:
            raise ModelError(f"{self.path}: embedding and head with as many rows expected, found {vocabulary}")

    def modules(self) -> dict[str, Parts]:
        """The tensors of the file by module and leaf. Raises: ModelError: a name of another form, or a bad value."""
        shards, found = Shards([self.path]), dict[str, Parts]()
        for key in shards.entries:
            match, leaf = next(((m, leaf) for pattern, leaf in KEYS if (m := pattern.fullmatch(key))), (None, ""))
            if match is None:
                raise self.refused(f"tensor {key!r}")
            module = (self.known.renamed(f"{match[1]}.weight") or "").removesuffix(".weight")
            value = shards.read(key)
            require_finite({key: value}, self.path)
            found.setdefault(module, {})[leaf] = value
        if not found:
            raise ModelError(f"{self.path}: holds no tensors: the adapter is empty")
        return found

    def branch_of_linear(self, module: str, parts: Parts) -> dict[str, StoredBranch]:
        """The branch of a block's linear, taken out of `parts`; none if only its bias was trained."""
        pair = _taken(parts)
        return {module: self._branch(module, pair, self.known.linears[module])} if pair else {}

    def tensors_of(self, module: str, parts: Parts) -> dict[str, TensorUpdate]:
        """What becomes of the module's weight and bias, taken out of `parts`; what is left there fits nowhere."""
        found, tensors = {}, self.known.tensors
        name, bias = f"{module}.weight", f"{module}.bias"
        if bias in tensors and "bias" in parts:
            found[bias] = TensorUpdate(self._value(bias, parts.pop("bias")))
        if name not in tensors:
            return found
        value = self._value(name, parts.pop("weight")) if "weight" in parts else None
        height = tensors[name][0] if value is None else value.shape[0]
        rows = self._rows(module, parts.pop("rows"), height) if "rows" in parts else None
        branch = self._branch_of_table(module, parts, (height, *tensors[name][1:]))
        if not (value is None and rows is None and branch is None):
            found[name] = TensorUpdate(value, rows, branch)
        return found

    def _branch_of_table(self, module: str, parts: Parts, shape: tuple[int, ...]) -> StoredBranch | None:
        """LoRA on the embedding, whose A and B are those of its transpose, or on the head."""
        if module == self.known.embedding and (pair := {leaf for leaf in parts if leaf.startswith("embedding_")}):
            if len(pair) != 2 or "magnitude" in parts:
                raise ModelError(f"{self.path}: {module}: lora_embedding_A and _B expected; no DoRA on an embedding")
            turned = {"lora_A": parts.pop("embedding_B").t(), "lora_B": parts.pop("embedding_A").t()}
            return self._branch(module, turned, shape)
        if module != self.known.head:
            return None
        pair_of_head = _taken(parts)
        return self._branch(module, pair_of_head, shape) if pair_of_head else None

    def _branch(self, module: str, parts: Parts, shape: tuple[int, ...]) -> StoredBranch:
        """Raises: ModelError: one of A and B is missing, a shape does not fit, or DoRA without magnitudes."""
        where, (out_features, in_features) = f"{self.path}: {module}", shape
        if not {"lora_A", "lora_B"} <= parts.keys():
            raise ModelError(f"{where}: only {sorted(parts)[0]} is there, a branch needs lora_A and lora_B")
        lora_A, lora_B, magnitude = parts["lora_A"], parts["lora_B"], parts.get("magnitude")
        fits = lora_A.dim() == lora_B.dim() == 2 and lora_A.shape[1] == in_features
        if not fits or lora_B.shape != (out_features, lora_A.shape[0]):
            raise ModelError(
                f"{where}: lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)}, "
                f"this base takes [R, {in_features}] and [{out_features}, R]"
            )
        uses_dora = bool(self.config.get("use_dora"))
        if uses_dora != (magnitude is not None) or (magnitude is not None and magnitude.shape != (out_features,)):
            found = "missing" if magnitude is None else list(magnitude.shape)
            raise ModelError(
                f"{where}: use_dora is {uses_dora} in {CONFIG} and lora_magnitude_vector is {found}; "
                f"[{out_features}] goes with true, and none with false"
            )
        scale = scale_of(self.config, module, lora_A.shape[0], self.folder)
        return StoredBranch(lora_A, lora_B, scale, number(self.config, "lora_dropout", 0.0, self.folder), magnitude)

    def _value(self, name: str, value: Tensor) -> Tensor:
        """Raises: ModelError: not of the base's shape; embedding and head may have more rows."""
        shape, known = self.known.tensors[name], self.known
        taller = name in (f"{known.embedding}.weight", f"{known.head}.weight") and len(value) > shape[0]
        if tuple(value.shape) != ((len(value), *shape[1:]) if taller else shape):
            raise ModelError(f"{self.path}: {name}: shape {list(value.shape)}, this base takes {list(shape)}")
        return value

    def _rows(self, module: str, values: Tensor, height: int) -> tuple[Tensor, Tensor]:
        """Raises: ModelError: the config does not give as many ids of rows that exist."""
        found = self.config.get("trainable_token_indices")
        if isinstance(found, dict):
            found = next((ids for name, ids in found.items() if f".{module}".endswith(f".{name}")), None)
        ids = found if isinstance(found, list) and all(type(i) is int and 0 <= i < height for i in found) else []
        width = self.known.tensors[f"{module}.weight"][1:]
        if not ids or tuple(values.shape) != (len(ids), *width):
            raise ModelError(
                f"{self.folder / CONFIG}: trainable_token_indices: the ids of the {len(values)} rows of {module} "
                f"expected, each below {height}, found {found!r:.80}"
            )
        return torch.tensor(ids), values
