"""What a recipe trains outside the linears of the blocks: tensors whole (`modules_to_save`), LoRA on embedding and head.

Why: planner and injection must mean the same tensors. How: names select modules by PEFT's rules, from shapes alone.
Imports no torch. Imported by planning.quantities, adapters.inject.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from qlora_kit.architecture_parts import TensorShape
from qlora_kit.errors import RecipeError, nearest
from qlora_kit.planning.shapes import ModelShapes, matches


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


def tables(shapes: ModelShapes) -> tuple[str, str]:
    """Names of the weights of embedding and head."""
    return f"{shapes.architecture.embedding}.weight", f"{shapes.architecture.head}.weight"
