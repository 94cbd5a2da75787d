"""Adapters taken for themselves, without a base: their pairs A and B by linear, read one at a time, and written anew.

Why: looking at adapters and combining them needs no model, and their factors say all of the update s B A [O, I]:
inner products, norms and singular values follow from matrices of the size of the rank, so [O, I] is never formed.
How: arithmetic in fp64, which costs nothing at these sizes; what is written is of the adapter's dtype.
Imported by: adapters.compose, adapters.resize, adapters.inspect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit import __version__
from qlora_kit.adapter_files import CONFIG, PAIR, PREFIX, WEIGHTS, number, read_config, scale_of, tensor_shapes
from qlora_kit.adapters.store import PROVENANCE, RECORDED, lora_config, provenance
from qlora_kit.adapters.updates import StoredBranch
from qlora_kit.base.shards import Shards, save_tensors
from qlora_kit.errors import ModelError
from qlora_kit.files import atomic_folder, write_json

CHOICE = (
    "target_modules",
    "layers_to_transform",
    "layers_pattern",
    "exclude_modules",
)  # PEFT's words for which linears
Pair = tuple[Tensor, Tensor]  # B [O, R], A [R, I]: the update is their product


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder, of which nothing but names and shapes is in memory."""

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, int, int]]  # (rank, O, I) of each linear that has a pair
    others: list[str]  # what else the file holds: magnitudes of DoRA, saved modules, biases

    @cached_property
    def shards(self) -> Shards:
        return Shards([self.folder / WEIGHTS])

    @property
    def name(self) -> str:
        """The shortest that tells it from others: runs end in `adapter`, so with the folder above it."""
        return "/".join(self.folder.absolute().parts[-2:])

    @property
    def size_bytes(self) -> int:
        """Of the folder's tensors on disk."""
        return (self.folder / WEIGHTS).stat().st_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the pairs; the widest, if they differ."""
        found = torch.bfloat16
        for index, name in enumerate(self.shapes):
            dtype = self.shards.entry(f"{PREFIX}{name}.lora_A.weight").dtype
            found = dtype if index == 0 else torch.promote_types(found, dtype)
        return found

    def branch(self, linear: str) -> StoredBranch:
        """The pair of a linear as stored. Raises: ModelError: NaN or infinity in it."""
        pair = {leaf: self.shards.read(f"{PREFIX}{linear}.lora_{leaf}.weight") for leaf in "AB"}
        for leaf, value in pair.items():
            if not torch.isfinite(value).all():
                raise ModelError(f"{self.folder / WEIGHTS}: {linear}.lora_{leaf} holds NaN or infinity")
        scale = scale_of(self.config, linear, self.shapes[linear][0], self.folder)
        return StoredBranch(pair["A"], pair["B"], scale, number(self.config, "lora_dropout", 0.0, self.folder))


def open_adapter(folder: Path) -> AdapterFile:
    """An adapter folder, its names and shapes checked.

    Raises: ModelError: no LoRA adapter there, one of a pair is missing, or the two do not fit together.
    """
    config, found, others = read_config(folder), dict[str, dict[str, list[int]]](), list[str]()
    for key, shape in tensor_shapes(folder).items():
        match = PAIR.fullmatch(key)
        if match is None:
            others.append(key.removeprefix(PREFIX))
        else:
            found.setdefault(match[1], {})[match[2]] = shape
    if not found:
        raise ModelError(f"{folder / WEIGHTS}: holds no pair of lora_A and lora_B")
    shapes = {linear: _fitting(found[linear], f"{folder / WEIGHTS}: {linear}") for linear in sorted(found, key=_order)}
    return AdapterFile(folder, config, shapes, others)


def _fitting(pair: Mapping[str, list[int]], where: str) -> tuple[int, int, int]:
    """(rank, O, I). Raises: ModelError: no pair."""
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None or len(a) != 2 or len(b) != 2 or a[0] != b[1] or not min(*a, *b):
        raise ModelError(f"{where}: lora_A {a} and lora_B {b}; [R, I] and [O, R] expected")
    return a[0], b[0], a[1]


def _order(linear: str) -> list[tuple[int, str]]:
    """Sorts names with numbers in them by these: layer 2 before layer 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in linear.split(".")]


def place(linear: str) -> tuple[str, str]:
    """Layer and module of a linear: `model.layers.3.self_attn.q_proj` -> ("3", "self_attn.q_proj")."""
    match = re.fullmatch(r".*?\.(\d+)\.(.+)", linear)
    return (match[1], match[2]) if match else ("-", linear)


def require_plain(adapter: AdapterFile, purpose: str) -> None:
    """Raises: ModelError: the adapter is more than pairs A and B, so that its update is not s B A alone."""
    if adapter.config.get("use_dora"):
        raise ModelError(
            f"{adapter.folder / CONFIG}: use_dora: {purpose} works on s B A alone, and a DoRA adapter also scales the "
            "base's rows; merge it into the base, or train plain LoRA"
        )
    if adapter.others:
        raise ModelError(
            f"{adapter.folder / WEIGHTS}: {adapter.others[0]}: {purpose} works on pairs lora_A and lora_B of linears "
            f"alone, and {len(adapter.others)} tensors are something else (modules_to_save, biases, embeddings, "
            "trained tokens); merge this adapter into the base instead"
        )


# ------------------------------------------------------------------------------------------------ arithmetic


def scaled(branch: StoredBranch, weight: float = 1.0) -> Pair:
    """weight s B and A, in fp64."""
    return branch.lora_B.double() * (weight * branch.scale), branch.lora_A.double()


def joined(pairs: list[Pair]) -> Pair:
    """The sum of several updates, as one pair of the sum of their ranks."""
    return torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs])


def core(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Q_B, C and Q_A with B A = Q_B C Q_A^T: orthonormal columns around a matrix that has all of the norms."""
    q_b, r_b = torch.linalg.qr(pair[0])
    q_a, r_a = torch.linalg.qr(pair[1].T)
    return q_b, r_b @ r_a.T, q_a


def norm(pair: Pair) -> float:
    """Frobenius norm of B A, exact also where it is the small difference of large updates."""
    return float(torch.linalg.matrix_norm(core(pair)[1]))


def inner(one: Pair, two: Pair) -> float:
    """<B1 A1, B2 A2> = tr((B1^T B2)(A2 A1^T))."""
    return float(((one[0].T @ two[0]) * (one[1] @ two[1].T)).sum())


def singular_values(pair: Pair) -> Tensor:
    """Of B A, descending, as many as its rank."""
    return torch.linalg.svdvals(core(pair)[1])


def nearest(pair: Pair, rank: int, alpha: float, dtype: torch.dtype, dropout: float) -> StoredBranch:
    """The nearest update of a rank (Eckart and Young 1936), its singular values shared by both factors.

    Args:
        alpha: of the branch, whatever rank is left: one for all linears, since not every server reads `alpha_pattern`.
    """
    q_b, middle, q_a = core(pair)
    u, sigma, v = torch.linalg.svd(middle, full_matrices=False)
    scale = alpha / len(sigma[:rank])
    root = (sigma[:rank] / scale).sqrt()
    lora_A, lora_B = root[:, None] * (v[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root
    return StoredBranch(lora_A.to(dtype), lora_B.to(dtype), scale, dropout)


# ------------------------------------------------------------------------------------------------ writing


def save_branches(out: Path, branches: Mapping[str, StoredBranch], made_from: list[AdapterFile]) -> None:
    """Write pairs as an adapter of the base of `made_from`; what these record alike of their base is kept.

    Raises: DiskError: `out` exists, or the disk refuses. ModelError: a value does not fit the dtype.
    """
    tensors = {f"{PREFIX}{name}.lora_A.weight": branch.lora_A for name, branch in branches.items()}
    tensors |= {f"{PREFIX}{name}.lora_B.weight": branch.lora_B for name, branch in branches.items()}
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ModelError(f"{out}: {key} is beyond the range of {value.dtype}; nothing was written")
    with atomic_folder(out) as folder:
        save_tensors(folder / WEIGHTS, {key: value.contiguous() for key, value in tensors.items()}, {"format": "pt"})
        write_json(folder / CONFIG, _config(branches, made_from))
        record = _alike([provenance(adapter.folder) for adapter in made_from], tuple(RECORDED))
        if record:
            write_json(folder / PROVENANCE, {"qlora_kit": __version__, **record})


def _alike(found: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[str, Any]:
    """What all that have the key say of it."""
    values = {key: [one[key] for one in found if one.get(key) is not None] for key in keys}
    return {key: said[0] for key, said in values.items() if said and all(value == said[0] for value in said)}


def _config(branches: Mapping[str, StoredBranch], made_from: list[AdapterFile]) -> dict[str, Any]:
    """PEFT's description; which linears have a pair is said as the first adapter says it, if it has the same ones."""
    first = made_from[0]
    ranks = {name: branch.lora_A.shape[0] for name, branch in branches.items()}
    config = lora_config(ranks, {name: branch.scale * ranks[name] for name, branch in branches.items()})
    config |= _alike([adapter.config for adapter in made_from], ("base_model_name_or_path", "revision"))
    chosen: dict[str, Any] = {"target_modules": sorted(branches)}
    if first.shapes.keys() == branches.keys():
        chosen = {key: first.config[key] for key in CHOICE if first.config.get(key)}
    dropout = number(first.config, "lora_dropout", 0.0, first.folder)
    return config | chosen | {"lora_dropout": dropout, "fan_in_fan_out": bool(first.config.get("fan_in_fan_out"))}
