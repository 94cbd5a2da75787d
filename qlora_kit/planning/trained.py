"""What a recipe trains outside the linears of the blocks: `modules_to_save`, whole, and LoRA on embedding and head.

Why: planner and injection must mean the same tensors. How: names select modules by PEFT's rules, from shapes alone.
Imports no torch. Imported by planning, adapters, training.loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import prod

from qlora_kit.architecture_parts import TensorShape
from qlora_kit.errors import RecipeError, nearest
from qlora_kit.planning.shapes import ModelShapes, matches
from qlora_kit.recipe import Adapter

TABLE_ROWS = 2048  # of an embedding or head that is trained whole, in one parameter; see `adapters.tables`


def trained_whole(shapes: ModelShapes, modules_to_save: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of these modules, in the model's order; the head also where it is tied.

    Args:
        modules_to_save: endings of the names of modules: embedding, head, norms.
    Raises: RecipeError: one selects nothing, or a linear of the blocks.
    Source: peft's `_set_trainable`: a name selects every module whose full name ends with it, at a dot or not.
    """
    return dict(_whole(shapes, tuple(modules_to_save)))


@lru_cache(maxsize=8)
def _whole(shapes: ModelShapes, modules_to_save: tuple[str, ...]) -> tuple[TensorShape, ...]:
    if not modules_to_save:
        return ()
    linears = [linear.name for linear in shapes.linears]
    head = f"{shapes.architecture.head}.weight"
    tensors = dict(shapes.tensors) | {head: (shapes.vocabulary, shapes.hidden)}
    modules = {name: name.rpartition(".")[0] for name in tensors}
    known = {name: module for name, module in modules.items() if not module.endswith(tuple(linears))}
    for wanted in modules_to_save:
        if any(linear.endswith(wanted) for linear in linears):
            raise RecipeError(
                f"adapter.modules_to_save: {wanted!r} is a linear of the decoder blocks, which is not trained whole; "
                "name it in adapter.target_modules"
            )
        if not any(module.endswith(wanted) for module in known.values()):
            leaves = list(dict.fromkeys(module.rpartition(".")[2] for module in known.values()))
            raise RecipeError(
                f"adapter.modules_to_save: {wanted!r} selects nothing{nearest(wanted, leaves)}; there are "
                f"{', '.join(leaves)}"
            )
    return tuple((name, tensors[name]) for name, module in known.items() if module.endswith(modules_to_save))


def trained_branches(shapes: ModelShapes, target_modules: str | Sequence[str]) -> list[str]:
    """Embedding and head, as far as a list of targets names them: modules that get a LoRA branch."""
    row = shapes.architecture
    if isinstance(target_modules, str):
        return []
    return [module for module in (row.embedding, row.head) if matches(module, target_modules)]


def trained_sizes(shapes: ModelShapes, adapter: Adapter, module: str | None = None) -> Counter[int]:
    """Parameters of a tensor that is trained outside the linears of the blocks -> how many tensors have as many.

    Args:
        module: only those of this module.
    Raises: RecipeError: a name selects nothing, or embedding or head both whole and by LoRA.
    """
    row, sizes = shapes.architecture, Counter[int]()
    tables = {f"{row.embedding}.weight", f"{row.head}.weight"}
    whole = trained_whole(shapes, adapter.modules_to_save)
    for name, shape in whole.items():
        if module is not None and name.rpartition(".")[0] != module:
            continue
        if name in tables:
            sizes[TABLE_ROWS * shape[1]] += shape[0] // TABLE_ROWS
            sizes[shape[0] % TABLE_ROWS * shape[1]] += 1
        else:
            sizes[prod(shape)] += 1
    for name in trained_branches(shapes, adapter.target_modules):
        if f"{name}.weight" in whole:
            raise RecipeError(f"adapter.modules_to_save: {name!r} is in adapter.target_modules too; choose one of them")
        if module in (None, name):
            sizes.update([adapter.rank * shapes.vocabulary, adapter.rank * shapes.hidden])
    return Counter({size: count for size, count in sizes.items() if size and count})


def trained_whole_table(shapes: ModelShapes, adapter: Adapter) -> str | None:
    """Embedding or head, if it is trained whole: then it lives on the device."""
    row, whole = shapes.architecture, trained_whole(shapes, adapter.modules_to_save)
    return next((name for name in (row.embedding, row.head) if f"{name}.weight" in whole), None)
