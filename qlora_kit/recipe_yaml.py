"""Safe YAML for recipes: where each key stands, nothing twice, nothing that runs code or grows without bound.

How: the safe subset of PyYAML, with `1e-4` a number. Imports no torch. Imported by recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from qlora_kit.errors import RecipeError

RECIPE_BYTES_LIMIT = 1 << 20


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-4` is a number and anchors are refused (they can grow without bound)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases are not supported in recipes", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Its counterpart: quotes a text that `_Loader` would read as a number, such as revision `12e4567`."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+"),
        list("-+0123456789."),
    )


def _lines(node: yaml.Node, source: str, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, line) of every key. Raises: RecipeError: a key stands twice in one mapping."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in seen:
            raise RecipeError(f"{source}:{line}: key {key!r} is given twice (first in line {seen[key]})")
        seen[key] = line
        yield key, line
        yield from _lines(value_node, source, f"{key}.")


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML mapping and the line of each dotted key.

    Raises: RecipeError: missing, too large, not YAML, not a mapping, or a duplicate key; names file and line.
    """
    try:
        if path.stat().st_size > RECIPE_BYTES_LIMIT:
            raise RecipeError(f"{path}: larger than {RECIPE_BYTES_LIMIT} bytes; this is no recipe")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; `qlora-kit recipes list` shows the prepared ones") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot read: {error}") from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines = dict(_lines(node, str(path))) if node else {}
        value = loader.construct_document(node) if node else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of sections, found {type(value).__name__}")
    return value, lines


def read_value(text: str) -> Any:
    """What a text means as a value; an empty one is null. Raises: ValueError: it is not valid YAML."""
    try:
        return yaml.load(text, _Loader) if text else None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


def to_yaml(values: dict[str, Any]) -> str:
    """A mapping as text that `read_yaml` reads back, its keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
