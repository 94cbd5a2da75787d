"""The README and the architecture page say what is there: every module in the tree, every command as it exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from qlora_kit.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "qlora_kit").rglob("*.py")), ids=lambda path: path.stem)
def test_every_module_stands_in_the_readmes_tree(path):
    tree = README.split("## Where things are")[1].split("```")[1]
    package = path.parent.relative_to(ROOT / "qlora_kit").as_posix()
    if path.stem in ("__init__", "__main__"):
        return
    line = tree if package == "." else next(line for line in tree.splitlines() if line.startswith(f"  {package}/"))
    assert re.search(rf"\b{path.stem}\b", line), f"{path.stem} is not in the README's tree"


def test_every_file_that_the_readme_names_exists():
    for name in re.findall(
        r"`((?:docs|tests|tools|recipes)/[\w./-]+)`", README + (ROOT / "docs/architecture.md").read_text()
    ):
        assert (ROOT / name).exists(), name


def test_every_command_in_the_readme_exists_with_its_options():
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"^qlora-kit ([^#\n]+)", README, re.MULTILINE):
        words = line.split()
        command = commands[words[0]]
        command = getattr(command, "commands", {}).get(words[1], command) if len(words) > 1 else command
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
