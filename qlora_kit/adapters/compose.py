"""Adapters of one base combined into one, and what the combination does to each of them.

With updates U_i = s_i B_i A_i, weights w_i and c_i = w_i s_i, for each linear on its own:
    cat      B = [B_1 ... B_n], A = [c_1 A_1; ...; c_n A_n]: exactly sum w_i U_i, of the sum of the ranks
    svd      the nearest update of `rank` to sum w_i U_i; exact when the rank suffices
    linear   B = sum sqrt|c_i| B_i, A = sum sign(c_i) sqrt|c_i| A_i: the terms B_i A_j of different adapters come in too
    ties     as linear, but of each factor only the largest `density` of its elements is kept, per element the sign of
             the larger sum is elected, and the mean of those that have it is taken
    dare     as linear, but each element is dropped with probability 1 - density and the rest divided by density
What `linear`, `ties` and `dare` do is what PEFT's add_weighted_adapter does under `linear`, `ties`, `dare_linear`.
An adapter without a pair on a linear takes no part there.
Source: TIES: Yadav et al. 2023, arXiv:2306.01708; DARE: Yu et al. 2024, arXiv:2311.03099; PEFT 0.21, utils/merge_utils.
Imported by: adapter_command.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.adapters.factors import (
    AdapterFile,
    Pair,
    inner,
    joined,
    nearest,
    norm,
    open_adapter,
    require_plain,
    save_branches,
    scaled,
)
from qlora_kit.adapters.lora import mixed_seed
from qlora_kit.adapters.store import PROVENANCE, provenance
from qlora_kit.adapters.updates import StoredBranch
from qlora_kit.errors import ModelError
from qlora_kit.files import require_new


@dataclass(frozen=True)
class Composition:
    """How adapters are combined.

    Attributes:
        method: linear, cat, svd, ties or dare.
        weights: one for each adapter; may be negative.
        rank: of `svd`; 0: the largest of the adapters at that linear.
        density: of `ties` and `dare`, above 0 and at most 1.
        seed: of what `dare` drops.
    """

    method: str
    weights: tuple[float, ...]
    rank: int = 0
    density: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Interference:
    """What the composition does at one linear.

    Attributes:
        norms: Frobenius norm of each adapter's update, without its weight; 0 where it has none.
        inner: inner product of the updates of each pair of adapters, in the order of itertools.combinations.
        wanted: norm of the weighted sum of the updates.
        error: norm of the composed update, as stored, less the weighted sum.
    """

    linear: str
    rank: int
    norms: tuple[float, ...]
    inner: tuple[float, ...]
    wanted: float
    error: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"cosines": cosines(self.norms, self.inner), "relative_error": ratio(self)}


def cosines(norms: tuple[float, ...], products: tuple[float, ...]) -> list[float | None]:
    """Of each pair of updates; None where one of the two is zero."""
    lengths = [one * two for one, two in combinations(norms, 2)]
    return [product / length if length else None for product, length in zip(products, lengths)]


def ratio(found: Interference) -> float | None:
    """Error of the composed update over the norm of the weighted sum; None where that sum is zero."""
    return found.error / found.wanted if found.wanted else None


def compose(folders: list[Path], how: Composition, out: Path) -> list[Interference]:
    """Write the composed adapter to the new folder `out`; what it does at each linear.

    Raises: ModelError: the adapters are not of one base, more than LoRA, or of ranks that the method cannot add.
        DiskError: `out` exists, or the disk refuses.
    """
    require_new(out)
    adapters = [open_adapter(folder) for folder in folders]
    for adapter in adapters:
        require_plain(adapter, "compose")
    require_one_base(adapters)
    linears = list(dict.fromkeys(name for adapter in adapters for name in adapter.shapes))
    if how.method not in ("cat", "svd"):
        require_one_rank(adapters, linears, how.method)
    dtype = adapters[0].dtype
    for adapter in adapters[1:]:
        dtype = torch.promote_types(dtype, adapter.dtype)
    branches, found = {}, []
    for linear in linears:
        present = [adapter.branch(linear) if linear in adapter.shapes else None for adapter in adapters]
        branches[linear] = composed(linear, present, how, dtype)
        found.append(interference(linear, present, how.weights, branches[linear]))
    save_branches(out, branches, adapters)
    return found


def require_one_base(adapters: list[AdapterFile]) -> None:
    """Raises: ModelError: two record different bases, or have linears of different shapes."""
    recorded = [(one, record) for one in adapters if (record := provenance(one.folder).get("base_fingerprint"))]
    for adapter, fingerprint in recorded[1:]:
        first, expected = recorded[0]
        if fingerprint != expected:
            raise ModelError(
                f"{adapter.folder / PROVENANCE}: trained on base {fingerprint:.8}, {first.folder} on base "
                f"{expected:.8}; updates of different bases do not add up: give adapters of one base"
            )
    for adapter in adapters[1:]:
        for name, (_, *shape) in adapter.shapes.items():
            expected_shape = list(adapters[0].shapes.get(name, (0, *shape))[1:])
            if shape != expected_shape:
                raise ModelError(
                    f"{adapter.folder}: {name} is {shape}, in {adapters[0].folder} {expected_shape} (out, in "
                    "features): these are adapters of different bases"
                )


def require_one_rank(adapters: list[AdapterFile], linears: list[str], method: str) -> None:
    """Raises: ModelError: a linear has pairs of different ranks, whose factors cannot be added."""
    for linear in linears:
        ranks = [adapter.shapes[linear][0] for adapter in adapters if linear in adapter.shapes]
        if len(set(ranks)) > 1:
            raise ModelError(
                f"{linear}: ranks {ranks}; {method} adds factors element by element, which takes one rank. "
                "Use --method cat (exact, ranks add) or --method svd --rank R, or `adapter resize` them first"
            )


# ------------------------------------------------------------------------------------------------ methods


def composed(linear: str, present: list[StoredBranch | None], how: Composition, dtype: torch.dtype) -> StoredBranch:
    """The branch of one linear, in the dtype it is stored in.

    Args:
        present: the pair of each adapter, None where it has none.
    """
    terms = [(branch, weight) for branch, weight in zip(present, how.weights) if branch is not None]
    pairs = [(branch.lora_B.double(), branch.lora_A.double()) for branch, _ in terms]
    factors = [weight * branch.scale for branch, weight in terms]
    dropout = terms[0][0].dropout
    if how.method == "svd":
        rank = how.rank or max(len(a) for _, a in pairs)
        return nearest(joined([(b, a * factor) for (b, a), factor in zip(pairs, factors)]), rank, rank, dtype, dropout)
    if how.method == "cat":
        # The largest factor becomes the scale: of that adapter, and of all that share it, every bit stays.
        scale = max(map(abs, factors)) or 1.0
        left, right = joined([(b, a * (factor / scale)) for (b, a), factor in zip(pairs, factors)])
    else:
        left, right = _of_elements(linear, pairs, factors, how)
        scale = 1.0
    return StoredBranch(right.to(dtype), left.to(dtype), scale, dropout)


def _of_elements(linear: str, pairs: list[Pair], factors: list[float], how: Composition) -> Pair:
    """B and A as sums of weighted factors, element by element; the sign of c goes into A (PEFT's rule)."""
    generator = torch.Generator().manual_seed(mixed_seed("dare", how.seed, linear))
    roots = [abs(factor) ** 0.5 for factor in factors]
    signed = [-root if factor < 0 else root for root, factor in zip(roots, factors)]
    right = ELEMENTWISE[how.method]([a for _, a in pairs], signed, how.density, generator)
    left = ELEMENTWISE[how.method]([b for b, _ in pairs], roots, how.density, generator)
    return left, right


def weighted(values: list[Tensor], weights: list[float], density: float, generator: torch.Generator) -> Tensor:
    """The weighted sum (PEFT: task_arithmetic); density and generator are other methods'."""
    return sum((value * weight for value, weight in zip(values, weights)), torch.zeros_like(values[0]))


def ties(values: list[Tensor], weights: list[float], density: float, generator: torch.Generator) -> Tensor:
    """Trim, elect sign, take the mean of those that agree (Yadav et al. 2023, algorithm 1; PEFT's `ties`)."""
    trimmed = torch.stack([trim(value, density) for value in values])
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agrees = trimmed.sign() == elected
    weighed = trimmed * torch.tensor(weights, dtype=trimmed.dtype)[:, None, None]
    return (weighed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def trim(value: Tensor, density: float) -> Tensor:
    """The largest `density` of the elements by magnitude, zero elsewhere."""
    kept = value.abs().flatten().topk(int(density * value.numel())).indices
    return torch.zeros_like(value).view(-1).index_copy_(0, kept, value.flatten()[kept]).view_as(value)


def dare(values: list[Tensor], weights: list[float], density: float, generator: torch.Generator) -> Tensor:
    """Drop at random and rescale, then add (Yu et al. 2024; PEFT's `dare_linear`)."""
    masks = [torch.bernoulli(torch.full(value.shape, density), generator=generator) for value in values]
    kept = [value * mask / density for value, mask in zip(values, masks)]
    return weighted(kept, weights, density, generator)


ELEMENTWISE: dict[str, Callable[[list[Tensor], list[float], float, torch.Generator], Tensor]] = {
    "linear": weighted,
    "ties": ties,
    "dare": dare,
}


# ------------------------------------------------------------------------------------------------ what it does


def interference(
    linear: str, present: list[StoredBranch | None], weights: tuple[float, ...], result: StoredBranch
) -> Interference:
    """Norms and inner products of the updates, and how far the composed one is from their weighted sum."""
    updates = [None if branch is None else scaled(branch) for branch in present]
    wanted = joined([scaled(branch, weight) for branch, weight in zip(present, weights) if branch is not None])
    products = [0.0 if one is None or two is None else inner(one, two) for one, two in combinations(updates, 2)]
    return Interference(
        linear=linear,
        rank=result.lora_A.shape[0],
        norms=tuple(0.0 if update is None else norm(update) for update in updates),
        inner=tuple(products),
        wanted=norm(wanted),
        error=norm(joined([scaled(result), (-wanted[0], wanted[1])])),
    )


def together(found: list[Interference], linear: str) -> Interference:
    """Several linears as one: all of a layer, or of the model."""
    norms = tuple(sum(n * n for n in column) ** 0.5 for column in zip(*(one.norms for one in found)))
    products = tuple(map(sum, zip(*(one.inner for one in found))))
    wanted, error = (sum(x * x for x in column) ** 0.5 for column in zip(*((one.wanted, one.error) for one in found)))
    return Interference(linear, max(one.rank for one in found), norms, products, wanted, error)
