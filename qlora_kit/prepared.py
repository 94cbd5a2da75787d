"""The prepared recipes of `recipes/`: found in the checkout, or in the installed package. Imported by: the commands."""

from __future__ import annotations

from pathlib import Path

from qlora_kit.errors import RecipeError, nearest


def recipes_folder() -> Path:
    """Where the prepared recipes are."""
    package = Path(__file__).parent
    checkout = package.parent
    return checkout / "recipes" if (checkout / "pyproject.toml").is_file() else package / "recipes"


def prepared_recipes() -> dict[str, tuple[Path, str]]:
    """Name -> (file, its first comment line)."""
    found = {}
    for path in sorted(recipes_folder().glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        found[path.stem] = (path, first.lstrip("# ").rstrip())
    return found


def find_recipe(name: str) -> Path:
    """The file of a prepared recipe. Raises: RecipeError: there is none of that name."""
    known = prepared_recipes()
    if name.removesuffix(".yaml") not in known:
        raise RecipeError(f"no prepared recipe {name!r}; there are {', '.join(known)}{nearest(name, list(known))}")
    return known[name.removesuffix(".yaml")][0]
