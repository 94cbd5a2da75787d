"""The prepared recipes of `recipes/`: found in the checkout or in the installed package, and what their heads promise.

Why: a user chooses by what a recipe takes, and wants to know it at once. How: the first line of a recipe says what it
is for, its `# planned:` line what it takes; the line is read, not computed, so the list does not depend on the machine
(`tools/prove_recipes.py` writes it, `tests/test_recipes.py` holds it to the planner). Imports no torch. Imported by:
the commands, tools.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.errors import RecipeError, nearest
from qlora_kit.recipe import Recipe, load_recipe
from qlora_kit.units import format_bytes, parse_bytes

CPU = "cpu"
_SIZE = r"([\d.]+ [KMGT]?i?B)"
_PLANNED = re.compile(
    rf"^# planned: {_SIZE} of {_SIZE} on ([\w.-]+), {_SIZE} of {_SIZE} RAM, "
    rf"{_SIZE} of disk beside {_SIZE} of base$",
    re.MULTILINE,
)
_MODEL = re.compile(r"^  path:\s*([^\s#]+)", re.MULTILINE)


@dataclass(frozen=True)
class Promise:
    """What a recipe is planned to take, as its head says it.

    Attributes:
        card: of the catalogue, or CPU: what it is planned for.
        peak_bytes, budget_bytes: on the device, at the highest moment of a run; and what it may take there.
        host_bytes, host_free_bytes: host memory beside the device that the run takes; and what must be free for its
            plan to be this one: with less, `auto` decides otherwise.
        disk_bytes: what the run writes: checkpoints, adapter, offloaded block inputs.
        base_bytes: the base in 16 bits, as it is downloaded; `merge` writes as much again.
    """

    peak_bytes: int
    budget_bytes: int
    card: str
    host_bytes: int
    host_free_bytes: int
    disk_bytes: int
    base_bytes: int

    def __str__(self) -> str:
        size = {name: format_bytes(value) for name, value in vars(self).items() if name != "card"}
        return (
            f"# planned: {size['peak_bytes']} of {size['budget_bytes']} on {self.card}, "
            f"{size['host_bytes']} of {size['host_free_bytes']} RAM, "
            f"{size['disk_bytes']} of disk beside {size['base_bytes']} of base"
        )


@dataclass(frozen=True)
class Prepared:
    """A prepared recipe.

    Attributes:
        about: what it is for, its first line.
        model: its `model.path`.
    """

    name: str
    path: Path
    about: str
    model: str
    promise: Promise

    def load(self) -> Recipe:
        """The recipe itself."""
        return load_recipe(self.path)

    def to_json(self) -> dict[str, Any]:
        """For `recipes list --json`."""
        recipe = self.load()
        tokens = recipe.data.seq_len * recipe.train.micro_batch * recipe.train.grad_accumulation
        about = {"name": self.name, "about": self.about, "path": str(self.path), "model": self.model}
        return about | {"tokens_per_step": tokens} | vars(self.promise)


def recipes_folder() -> Path:
    """Where the prepared recipes are."""
    package = Path(__file__).parent
    checkout = package.parent
    return checkout / "recipes" if (checkout / "pyproject.toml").is_file() else package / "recipes"


def prepared_recipes() -> dict[str, Prepared]:
    """By name, those for the smallest devices first. Raises: RecipeError: a head without its two lines, or no model."""
    found = [_prepared(path) for path in sorted(recipes_folder().glob("*.yaml"))]
    found.sort(key=lambda one: (one.promise.card != CPU, one.promise.budget_bytes))
    return {one.name: one for one in found}


def _prepared(path: Path) -> Prepared:
    """What is found in the text of a recipe: parsing all of them would take longer than a plan."""
    text = path.read_text(encoding="utf-8")
    model = _MODEL.search(text)
    if model is None:
        raise RecipeError(f"{path}: no line like `  path: MODEL` below `model:`")
    return Prepared(path.stem, path, text.partition("\n")[0].lstrip("# "), model[1], read_promise(text, path))


def read_promise(text: str, path: Path) -> Promise:
    """The promise in a recipe's text. Raises: RecipeError: it has none."""
    match = _PLANNED.search(text)
    if match is None:
        raise RecipeError(f"{path}: no line like {Promise(0, 0, CPU, 0, 0, 0, 0)}")
    peak, budget, card, *others = match.groups()
    return Promise(parse_bytes(peak), parse_bytes(budget), card, *map(parse_bytes, others))


def find_recipe(name: str) -> Path:
    """The file of a prepared recipe. Raises: RecipeError: there is none of that name."""
    known = {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}
    if name.removesuffix(".yaml") not in known:
        raise RecipeError(f"no prepared recipe {name!r}; there are {', '.join(known)}{nearest(name, list(known))}")
    return known[name.removesuffix(".yaml")]


def table(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of a table of recipes, each as `Prepared.to_json` gives it; long ones run over, nothing is cut."""
    heads = ("recipe", "model", "budget", "planned", "host RAM", "tokens/step", "for what")
    rows = [heads, *map(_cells, found)]
    name, model, *figures, _ = (max(map(len, column)) for column in zip(*rows))
    for row in rows:
        aligned = (cell.rjust(width) for cell, width in zip(row[2:-1], figures))
        yield "  ".join((row[0].ljust(name), row[1].ljust(model), *aligned, row[-1]))


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    sizes = (format_bytes(one[f"{key}_bytes"]) for key in ("budget", "peak", "host"))
    return (one["name"], one["model"].rpartition("/")[2], *sizes, f"{one['tokens_per_step']:,}", one["about"])
