"""Adapters on a base: hang branches in, choose which are active or which row of a batch has which, merge in place.

Imported by: adapters.store, training.loop, generation, export, the commands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from qlora_kit import recipe
from qlora_kit.adapters.initialise import LORA_INITIALISATIONS
from qlora_kit.adapters.lora import DropoutSeed, LoRABranch, mixed_seed
from qlora_kit.adapters.tables import TrainedTable
from qlora_kit.adapters.tensors import put_tensors, tensor_of, trained_tensor
from qlora_kit.base.loader import Base
from qlora_kit.errors import ModelError, RecipeError, nearest
from qlora_kit.planning.shapes import matches, model_shapes
from qlora_kit.planning.trained import trained_branches, trained_whole

DEFAULT = "default"


def inject(base: Base, settings: recipe.Adapter, seed: int, name: str = DEFAULT) -> DropoutSeed:
    """Give every targeted linear a fresh branch, and make the adapter the only active one.

    A is drawn from (seed, position of the linear), so it does not depend on which other linears are targeted.
    Returns: the seed of the branches' dropout, for the training loop to advance.
    Raises: RecipeError: `target_modules` matches nothing.
    """
    linears = base.linears()
    targets = [linear for linear in linears if matches(linear, settings.target_modules)]
    if not targets:
        leaves = sorted({linear.rpartition(".")[2] for linear in linears})
        wrong = settings.target_modules if isinstance(settings.target_modules, str) else settings.target_modules[0]
        raise RecipeError(
            f"adapter.target_modules: {settings.target_modules!r} matches no linear of the decoder blocks; "
            f"they are {', '.join(leaves)}{nearest(wrong, leaves)}"
        )
    dropout_seed = DropoutSeed()
    for index, (linear_name, linear) in enumerate(linears.items()):
        if linear_name in targets:
            shape = (linear.out_features, linear.in_features)
            linear.branches[name] = _fresh(base, settings, seed, shape, index, dropout_seed)
    base.updates[name] = _fresh_tensors(base, settings, seed, dropout_seed)
    activate(base, [name])
    return dropout_seed


def _fresh(
    base: Base, settings: recipe.Adapter, seed: int, shape: tuple[int, ...], index: int, dropout_seed: DropoutSeed
) -> LoRABranch:
    """The branch of a matrix [O, I], A random and B zero."""
    dtype, (out_features, in_features) = getattr(torch, settings.dtype), shape
    generator = torch.Generator().manual_seed(mixed_seed("lora_A", seed, index))
    lora_A = torch.empty(settings.rank, in_features)
    LORA_INITIALISATIONS[settings.init](lora_A, generator)
    return LoRABranch(
        lora_A.to(base.device, dtype),
        torch.zeros(out_features, settings.rank, device=base.device, dtype=dtype),
        scale=settings.scale,
        dropout_probability=settings.dropout,
        dropout_seed=dropout_seed,
        index=index,
    )


def _fresh_tensors(base: Base, settings: recipe.Adapter, seed: int, dropout_seed: DropoutSeed) -> dict[str, Any]:
    """What is trained outside the linears of the blocks, as the base has it; see `planning.trained`."""
    if not settings.modules_to_save and isinstance(settings.target_modules, str):
        return {}
    shapes = model_shapes(base.model.config.to_dict(), str(base.folder))
    found: dict[str, Any] = {
        tensor: trained_tensor(base, tensor, tensor_of(base, tensor))
        for tensor in trained_whole(shapes, settings.modules_to_save)
    }
    for number, module in enumerate(trained_branches(shapes, settings.target_modules)):
        index, size = len(base.linears()) + number, (shapes.vocabulary, shapes.hidden)
        found[f"{module}.weight"] = _fresh(base, settings, seed, size, index, dropout_seed)
    return found


def branches(base: Base, name: str = DEFAULT) -> dict[str, LoRABranch]:
    """The branches of one adapter by the full name of their linear, in the model's order."""
    return {
        linear_name: linear.branches[name]  # type: ignore[misc]
        for linear_name, linear in base.linears().items()
        if name in linear.branches
    }


def adapter_names(base: Base) -> list[str]:
    """The adapters that this base carries, in the order in which they came."""
    on_linears = dict.fromkeys(name for linear in base.linears().values() for name in linear.branches)
    return list(on_linears | dict.fromkeys(name for name, updates in base.updates.items() if updates))


def activate(base: Base, names: Iterable[str]) -> None:
    """Choose the adapters that take part from now on; none: the plain base.

    Raises: ModelError: no such adapter on this base, or some that cannot work together.
    """
    names = tuple(names)
    _require_loaded(base, names)
    for linear in base.linears().values():
        if linear.merged is not None:
            raise ModelError("an adapter is merged into the base; unmerge it before choosing another")
        chosen = [linear.branches[name] for name in names if name in linear.branches]
        if len(names) > 1 and any(branch.magnitude is not None for branch in chosen):
            raise ModelError(f"a DoRA adapter works alone, since it scales the whole weight; asked for {list(names)}")
    put_tensors(base, names)
    for linear in base.linears().values():
        linear.active = names


def _require_loaded(base: Base, names: Iterable[str]) -> None:
    """Raises: ModelError: no such adapter on this base."""
    known = adapter_names(base)
    for name in names:
        if name not in known:
            raise ModelError(f"adapter {name!r} is not loaded; loaded are {known}{nearest(name, known)}")


@contextlib.contextmanager
def per_row(base: Base, names: Sequence[str | None]) -> Iterator[None]:
    """Within the with-block row i of every batch passes through adapter `names[i]`; afterwards all is as before.

    Without gradients and dropout. The base is passed once for all rows; rows of one adapter are best side by side.

    Args:
        names: None is the plain base.
    Raises: ModelError: no such adapter, one is merged, or one changes a tensor that the rows share.
    """
    wanted = [name for name in dict.fromkeys(names) if name is not None]
    _require_loaded(base, wanted)
    for name in wanted:
        for tensor in base.updates.get(name, {}):
            raise ModelError(
                f"adapter {name!r} changes {tensor!r}, which all rows of a batch share; run it by itself, or choose "
                "adapters that change linears of the blocks only"
            )
    linears = list(base.linears().values())
    before = linears[0].active
    activate(base, [])
    try:
        for linear in linears:
            linear.rows = tuple(names)
        with torch.no_grad():
            yield
    finally:
        for linear in linears:
            linear.rows = None
        activate(base, before)


def merge(base: Base) -> None:
    """Put the active adapters into dense copies of the weights: no cost per token, more memory. See `unmerge`."""
    for linear in base.linears().values():
        linear.merge()


def unmerge(base: Base) -> None:
    """Undo `merge` exactly."""
    for linear in base.linears().values():
        linear.unmerge()


def trainable_parameters(base: Base, name: str = DEFAULT) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of an adapter: `model.layers.0.self_attn.q_proj.lora_A` and so on.

    Of an embedding or head that is trained whole: its pieces, `lm_head.weight.0` and so on.
    """
    hung: dict[str, Any] = {**branches(base, name), **base.updates.get(name, {})}
    for owner, trained in hung.items():
        if isinstance(trained, LoRABranch):
            yield f"{owner}.lora_A", trained.lora_A
            yield f"{owner}.lora_B", trained.lora_B
        elif isinstance(trained, TrainedTable):
            yield from ((f"{owner}.{index}", piece) for index, piece in enumerate(trained.pieces))
        elif isinstance(trained, torch.nn.Parameter):
            yield owner, trained
