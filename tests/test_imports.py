"""Claims about structure: imports go down one order, planning needs no torch, and one module writes.

Every file of the package is parsed with `ast`, so a claim holds for code that no test runs.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qlora_kit"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in FILES}

# The order, lowest first: a part imports, at module level, only from rows above its own. A package is one part.
ORDER = (
    ("", "errors", "units"),  # "": qlora_kit/__init__.py
    ("files", "console", "pages", "architecture_parts", "optimizers", "adapter_files", "widths"),
    ("architectures", "recipe_yaml"),
    ("recipe",),
    ("planning", "data", "prepared"),
    ("serving",),
    ("base",),
    ("adapters",),
    ("training", "generation", "export"),
    ("profiling", "chat"),
    ("doctor", "selftest", "commands", "options"),
    ("model_commands", "plan_command", "export_command", "adapter_command"),
    ("cli",),
    ("__main__",),
)
RANK = {part: rank for rank, row in enumerate(ORDER) for part in row}
# The torch line: what is planned, checked or said before a run must not wait for seconds of imports.
LIGHT_PARTS = {"", "errors", "units", "files", "console", "pages", "architecture_parts", "architectures"}
LIGHT_PARTS |= {"optimizers", "prepared", "widths", "recipe", "recipe_yaml", "adapter_files", "serving"}
LIGHT_PARTS |= {"planning", "doctor", "commands", "options", "cli", "__main__"}
LIGHT_PARTS |= {"model_commands", "plan_command", "export_command", "adapter_command"}
LIGHT_FILES = {f"data/{name}.py" for name in ("__init__", "formats", "templates", "tokenize", "packing", "lengths")}
HEAVY = ("torch", "transformers", "bitsandbytes", "accelerate", "peft", "tokenizers")


def part_of(name: str) -> str:
    """`base/nf4.py` -> `base`, `recipe.py` -> `recipe`, `__init__.py` -> ``."""
    return name.removesuffix("__init__.py").partition("/")[0].removesuffix(".py")


def module_level_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, full name) of what is imported when the module is; not what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (found for branch in node.orelse for found in module_level_imports(branch))
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide where a thing comes from"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        else:
            yield from module_level_imports(node)


def parts_imported(name: str) -> Iterator[tuple[int, str]]:
    """(line, part of qlora_kit) for each module-level import of a file."""
    for line, imported in module_level_imports(TREES[name]):
        package, _, rest = f"{imported}.".partition(".")
        if package == "qlora_kit":
            part = rest.partition(".")[0]
            yield line, part if part in RANK else ""


# ------------------------------------------------------------------------------------------------ direction


@pytest.mark.parametrize("name", TREES)
def test_every_file_has_its_place_in_the_order_and_imports_only_from_below(name: str) -> None:
    part = part_of(name)
    assert part in RANK, f"{name}: give {part!r} a place in ORDER"
    upward = [(line, other) for line, other in parts_imported(name) if other != part and RANK[other] >= RANK[part]]
    assert upward == []


@pytest.mark.parametrize("name", [name for name in TREES if part_of(name) in LIGHT_PARTS or name in LIGHT_FILES])
def test_nothing_above_the_torch_line_imports_it_with_the_module(name: str) -> None:
    assert [found for found in module_level_imports(TREES[name]) if found[1].partition(".")[0] in HEAVY] == []


def test_the_order_names_no_part_that_is_gone() -> None:
    assert {part_of(name) for name in TREES} >= set(RANK)
    assert set(TREES) >= LIGHT_FILES


@pytest.mark.parametrize("name", [name for name in TREES if TREES[name].body])
def test_every_file_opens_with_what_it_is(name: str) -> None:
    assert len(ast.get_docstring(TREES[name]) or "") > 20


# ------------------------------------------------------------------------------------------------ in a process

# Runs commands one after the other in one process; prints those after which a heavy package was there.
WATCH = """
import contextlib, io, json, sys
from qlora_kit.cli import app
from qlora_kit.errors import QLoRAKitError

commands, heavy, guilty, codes = json.loads(sys.argv[1]), json.loads(sys.argv[2]), {}, []
for command in commands:
    code = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            app(command, standalone_mode=True)
        except SystemExit as end:
            code = end.code or 0
        except QLoRAKitError as error:
            code = error.exit_code
    codes.append(code)
    found = [name for name in heavy if name in sys.modules]
    if found:
        guilty[" ".join(command)] = found
print(json.dumps([codes, guilty]))
"""
WORDS = "plan train profile eval generate merge quantize adapter recipes doctor selftest".split()
HELP = [["--help"], *([word, "--help"] for word in WORDS)]
HELP += [[*pair.split(), "--help"] for pair in ("adapter show", "adapter compose", "adapter resize")]
HELP += [["recipes", word, "--help"] for word in ("list", "show", "copy")]


def watched(*commands: list[str]) -> tuple[list[int], dict[str, list[str]]]:
    """Exit codes, and which commands brought in which heavy packages."""
    arguments = [json.dumps(commands), json.dumps(HEAVY)]
    run = subprocess.run([sys.executable, "-c", WATCH, *arguments], capture_output=True, text=True, check=True)
    codes, guilty = json.loads(run.stdout)
    return codes, guilty


def test_help_of_every_command_needs_no_torch() -> None:
    codes, guilty = watched(*HELP)
    assert guilty == {}
    assert set(codes) == {0}


def test_planning_and_refusing_need_no_torch(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: llama-2-7b}\ndata: {train: t}\n")
    codes, guilty = watched(
        ["plan", "llama-2-7b", "--gpu", "rtx-4090", "--json"],
        ["plan", str(recipe), "--budget", "24GiB"],
        ["recipes", "list"],
        ["recipes", "show", "quickstart"],
        ["train", str(recipe), "--set", "adapter.rnak=3"],
        ["train", str(recipe), "--set", "memory.budget=1GiB"],
    )
    assert guilty == {}
    assert codes == [0, 0, 0, 0, 2, 6]


def test_the_watch_sees_torch_where_it_is_needed() -> None:
    assert "torch" in watched(["doctor", "--json"])[1]["doctor --json"]


# ------------------------------------------------------------------------------------------------ one module writes

# Calls that write, run code from a file, or lose a half-written one; `files.py` alone may use what is durable of them.
FORBIDDEN_FUNCTIONS = {
    *(f"os.{name}" for name in ("rename", "replace", "link", "truncate", "system", "popen")),
    *(f"torch.{name}" for name in ("save", "load")),
    *(f"shutil.{name}" for name in ("move", "copy", "copy2", "copyfile", "copytree", "unpack_archive")),
    *("eval", "exec", "compile", "__import__", "save_file", "safetensors.torch.save_file", "yaml.load_all"),
    *("yaml.unsafe_load", "yaml.full_load", "numpy.save", "numpy.load", "np.save", "np.load"),
}
FORBIDDEN_METHODS = {"write_text", "write_bytes", "touch", "rename", "symlink_to", "extractall", "save_pretrained"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "h5py", "tarfile"}
ALLOWED = {
    ("training/metrics.py", "open for writing"): "the log of a run is appended to, line by line (files.append_line)",
}


def mode_of(call: ast.Call) -> str:
    """The mode of an `open`; `?` when it is not written out."""
    given = [argument.value for argument in call.keywords if argument.arg == "mode"] or call.args[1:2]
    if not given:
        return "r"
    return str(given[0].value) if isinstance(given[0], ast.Constant) else "?"


def offence(call: ast.Call) -> str | None:
    """What a call does that only `files` may do, or nobody."""
    name = ast.unparse(call.func)
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if name == "yaml.load":
        loader = [*call.args[1:], *(keyword.value for keyword in call.keywords if keyword.arg == "Loader")]
        return None if [ast.unparse(node) for node in loader] == ["_Loader"] else "yaml.load without the safe loader"
    if name in ("open", "io.open", "os.fdopen") and set(mode_of(call)) & set("wax+?"):
        return "open for writing"
    if name in FORBIDDEN_FUNCTIONS:
        return name
    if method in FORBIDDEN_METHODS and name not in ("files.write_text", "files.write_bytes"):
        return f".{method}()"
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if keywords.get("trust_remote_code", "False") != "False" or keywords.get("shell", "False") != "False":
        return "runs code from outside"
    return None


def offences(tree: ast.AST) -> Iterator[str]:
    """Every forbidden call and import of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (found := offence(node)):
            yield found
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in modules if name.partition(".")[0] in FORBIDDEN_MODULES)
            yield from (f"import {alias.name}" for alias in node.names if alias.name == "save_file")


@pytest.mark.parametrize("name", [name for name in TREES if name != "files.py"])
def test_only_files_writes_and_nothing_runs_code_from_a_file(name: str) -> None:
    assert [found for found in offences(TREES[name]) if (name, found) not in ALLOWED] == []


def test_the_recipes_loader_is_a_safe_one() -> None:
    import yaml

    from qlora_kit.recipe_yaml import _Dumper, _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
    assert issubclass(_Dumper, yaml.SafeDumper)


def test_every_exception_to_the_rule_is_still_needed() -> None:
    assert [(name, found) for name, found in ALLOWED if found not in offences(TREES[name])] == []


@pytest.mark.parametrize(
    "code",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "open(path, 'r+')",
        "open(path, how)",
        "path.write_text('x')",
        "Path(x).write_bytes(b'')",
        "os.replace(a, b)",
        "path.rename(b)",
        "torch.load(path)",
        "from safetensors.torch import save_file",
        "import pickle",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "eval(text)",
        "model.save_pretrained(out)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_rule_sees_what_it_forbids(code: str) -> None:
    assert len(list(offences(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    "code", ["open(path)", "open(path, 'rb')", "files.write_text(p, t)", "model.eval()", "text.replace(a, b)"]
)
def test_the_rule_lets_reading_pass(code: str) -> None:
    assert list(offences(ast.parse(code))) == []
