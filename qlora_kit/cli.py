"""The commands. Each imports only what it needs: `plan` and `--help` never import torch.

Results go to stdout, progress and notes to stderr; `--json` prints one JSON object and nothing else. A user's mistake
ends in one line and the exit code of its kind (`qlora_kit.errors`), never in a traceback. Called as `qlora-kit`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from qlora_kit import __version__, adapter_command, export_command, model_commands
from qlora_kit.commands import plan_recipe, require_fit, write_profile
from qlora_kit.errors import DiskError, QLoRAKitError, RecipeError, nearest
from qlora_kit.options import AsJson, Overrides, print_json

app = typer.Typer(
    name="qlora-kit",
    help="QLoRA fine-tuning for people whose memory is the limit.\n\nStart with `qlora-kit doctor`, ask "
    "`qlora-kit plan RECIPE` whether a run fits, then `train`, `eval`, `merge`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
recipes_app = typer.Typer(help="The prepared recipes, each with what it takes; without a command, `list`.")
app.add_typer(recipes_app, name="recipes")
app.add_typer(adapter_command.app, name="adapter")
app.add_typer(export_command.export_app, name="export")

STACKS = ("kit", "peft", "peft-liger", "litgpt")


def main() -> NoReturn:
    """Run the command line; the only place where errors become exit codes."""
    try:
        app(standalone_mode=True)
    except QLoRAKitError as error:
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        for line in str(error).splitlines():
            print(line if line.startswith(" ") else f"qlora-kit {command}: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `| head` has seen enough
        sys.exit(0)
    except OSError as error:  # a disk's refusal that no module has put into words of its own
        print(f"qlora-kit: {error}", file=sys.stderr)
        sys.exit(DiskError.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qlora-kit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


# ------------------------------------------------------------------------------------------------ plan and train


@app.command()
def plan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_MODEL",
            help="A recipe, a folder with config.json, a config.json, a hub id, or a name of the built-in catalogue "
            "(llama-3.1-70b), which needs no download.",
        ),
    ],
    budget: Annotated[str | None, typer.Option(help="Device memory to plan for, such as 24GiB.")] = None,
    gpu: Annotated[str | None, typer.Option(help="A card of the catalogue, such as rtx-4090.")] = None,
    stack: Annotated[str, typer.Option(help="kit | peft | peft-liger | litgpt: what the run takes elsewhere.")] = "kit",
    data: Annotated[
        Path | None, typer.Option(help="Plan for this file's real lengths; needs a local model folder.")
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Run a step of the real code, shapes only, on a simulated card.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the report there, as one html file.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run will take, before anything is loaded.

    Bytes of every component on the device and of every phase, whether that fits and with how much room, the time of a
    step on a card of the catalogue (estimated), and what to change if it does not fit, with what each change costs.
    Ends with exit code 6 when it does not fit.

    Example: `qlora-kit plan llama-3.1-8b --gpu rtx-4090 --set data.seq_len=2048`
    """
    from qlora_kit.errors import BudgetError

    if stack not in STACKS:
        raise RecipeError(f"--stack: one of {', '.join(STACKS)}, found {stack!r}{nearest(stack, list(STACKS))}")
    from qlora_kit.plan_command import answer

    found = answer(target, overrides or [], budget, gpu, stack=stack, data=data, simulate=simulate)
    if html is not None:
        found.write_html(html)
    if as_json:
        print_json(found.to_json())
    else:
        found.print()
    if not found.fits:
        raise typer.Exit(BudgetError.exit_code)


@app.command()
def train(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see `qlora-kit recipes`.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint of `output`.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away the run that `output` holds.")] = False,
) -> None:
    """Plan, load, train and save an adapter.

    The run is refused before anything is loaded if it cannot fit. SIGINT and SIGTERM save the state first (exit 130,
    143); `--resume` then continues bit for bit. The folder `output` ends with `adapter/` (PEFT's format), `best/` (the
    step with the lowest held-out loss), `checkpoints/`, `metrics.jsonl`, `plan.json`, `memory.json` and `report.html`.

    Example: `qlora-kit train my.yaml --set adapter.rank=32 --set output=runs/rank32`
    """
    from qlora_kit.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides or [])
    made = plan_recipe(recipe)
    require_fit(made, recipe_file)
    from qlora_kit.profiling.profiler import followed_step
    from qlora_kit.training.loop import train as run_training

    recipe = made.placed(recipe)
    result = run_training(recipe, resume=resume, restart=restart, plan=made.to_json(), first_step=followed_step)
    from qlora_kit.training.summary import print_summary

    print_summary(recipe, result)


@app.command()
def profile(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see `qlora-kit recipes`.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html and timeline.png, the memory of a step over time.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run steps of the worst shape that the data has; report measured bytes of each component beside the plan.

    The real run, its model and data, but nothing is saved. Beside the timed steps one warms up, and one is followed
    byte by byte.

    Example: `qlora-kit profile my.yaml --out runs/my/profile`
    """
    from qlora_kit.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides or [])
    made = plan_recipe(recipe)
    require_fit(made, recipe_file)
    from qlora_kit.profiling.profiler import profile as run_profile

    found = run_profile(made.placed(recipe), made, steps)
    if out is not None:
        write_profile(found, recipe.model.path, out)
    print_json(found.to_json()) if as_json else print("\n".join(found.lines()))


# ------------------------------------------------------------------------------------------------ using a model

app.command(name="eval")(model_commands.evaluate)
app.command()(model_commands.generate)
app.command()(model_commands.chat)
app.command()(model_commands.merge)
app.command()(model_commands.quantize)


# ------------------------------------------------------------------------------------------------ recipes and machine


@recipes_app.callback(invoke_without_command=True)
def _recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list")
def recipes_list(as_json: AsJson = False) -> None:
    """The prepared recipes: model, planned peak, host memory, tokens a step, and what each is for.

    The figures are those of the plan for the card that a recipe names; `qlora-kit plan` says what it takes on yours.
    """
    from qlora_kit.prepared import prepared_recipes, table

    found = [prepared.to_json() for prepared in prepared_recipes().values()]
    if as_json:
        print_json({"recipes": found})
        return
    print("\n".join(table(found)))
    print("next: qlora-kit recipes copy RECIPE my.yaml")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a prepared recipe."""
    from qlora_kit.prepared import find_recipe

    print(find_recipe(name).read_text(), end="")


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(metavar="NAME")], file: Annotated[Path, typer.Argument(metavar="FILE")]
) -> None:
    """Copy a prepared recipe to FILE, to be edited."""
    from qlora_kit import files
    from qlora_kit.prepared import find_recipe

    if file.exists():
        raise RecipeError(f"{file}: already exists; choose another name")
    files.write_bytes(file, find_recipe(name).read_bytes())
    print(f"{file}: now `qlora-kit plan {file}`")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine has for training, and what is missing."""
    from qlora_kit.doctor import examine, print_report

    report = examine()
    print_json(report) if as_json else print_report(report)


@app.command()
def selftest(
    device: Annotated[str, typer.Option(help="auto | cpu | cuda | xpu | mps")] = "auto", as_json: AsJson = False
) -> None:
    """Prove the kit's promises on this machine, in a minute: exit 0 if all hold, 1 if one does not.

    A small model of random weights is trained for a few steps on the device: streamed, recomputed, resumed, merged.
    Where bits are promised, bits are compared.
    """
    from qlora_kit.base.device import pick_device
    from qlora_kit.selftest import report, run

    where = pick_device(device)
    proofs = report(run(where), where, quiet=as_json)
    if as_json:
        print_json({"device": str(where), "proofs": [vars(proof) for proof in proofs]})
    if not all(proof.passed for proof in proofs):
        raise typer.Exit(1)
