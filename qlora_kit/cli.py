"""The commands. Each imports only what it needs: `plan` and `--help` never import torch.

Results go to stdout, progress and notes to stderr; `--json` prints one JSON object and nothing else. A user's mistake
ends in one line and the exit code of its kind (`qlora_kit.errors`), never in a traceback. Called as `qlora-kit`.
"""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from qlora_kit import __version__
from qlora_kit.commands import (
    check_data,
    load_model,
    model_folder,
    not_built,
    plan_recipe,
    prove_merged,
    recipe_or_model,
    require_fit,
    section,
    write_profile,
)
from qlora_kit.errors import DiskError, QLoRAKitError, RecipeError, nearest

app = typer.Typer(
    name="qlora-kit",
    help="QLoRA fine-tuning for people whose memory is the limit.\n\nStart with `qlora-kit doctor`, ask "
    "`qlora-kit plan RECIPE` whether a run fits, then `train`, `eval`, `merge`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
recipes_app = typer.Typer(help="The prepared recipes, each with the budget it was planned for.", no_args_is_help=True)
adapter_app = typer.Typer(help="Look at adapters and combine them.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(adapter_app, name="adapter")

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
ModelPath = Annotated[str, typer.Option("--model", help="Folder or hub id of the model.")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Accept an adapter that was trained on another base.")]
Quantization = Annotated[
    str, typer.Option(help="auto | nf4 | fp4 | none. auto: as the adapter was trained; without one, none.")
]
PlacementOption = Annotated[
    str,
    typer.Option("--placement", help="auto | device | host | disk: where the blocks live; streamed ones fit anywhere."),
]

STACKS = ("kit", "peft", "peft-liger", "litgpt")


class DType(str, Enum):
    """Of what `merge` writes."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class QuantType(str, Enum):
    """The 4-bit types of `quantize`."""

    nf4 = "nf4"
    fp4 = "fp4"


class Onto(str, Enum):
    """The weights that the update is added to."""

    auto = "auto"
    original = "original"
    dequantized = "dequantized"


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


def _print_json(value: Any) -> None:
    print(json.dumps(value, allow_nan=False))


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
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Run a step of the real code, shapes only, on a simulated card.")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run will take, before anything is loaded.

    Bytes of every component on the device and of every phase, whether that fits, and what to change if not.
    Ends with exit code 6 when it does not fit.

    Example: `qlora-kit plan llama-3.1-8b --gpu rtx-4090 --set data.seq_len=2048`
    """
    from qlora_kit.errors import BudgetError

    if stack not in STACKS:
        raise RecipeError(f"--stack: one of {', '.join(STACKS)}, found {stack!r}{nearest(stack, list(STACKS))}")
    if stack != "kit":
        not_built(f"plan --stack {stack}")
    recipe = recipe_or_model(target, overrides or [])
    made, simulated = plan_recipe(recipe, budget, gpu), None
    if simulate:
        from qlora_kit.profiling.simulate import simulate as run_simulation

        simulated = run_simulation(made, recipe)
    if as_json:
        _print_json(made.to_json() | ({} if simulated is None else {"simulated": simulated.to_json()}))
    else:
        from qlora_kit.console import stdout
        from qlora_kit.planning.report import print_plan

        print_plan(made, stdout)
        for line in simulated.lines(made.components) if simulated is not None else ():
            print(line)
    if not made.fits or (simulated is not None and simulated.refused is not None):
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
    step with the lowest held-out loss), `checkpoints/`, `metrics.jsonl`, `plan.json` and `memory.json`.

    Example: `qlora-kit train my.yaml --set adapter.rank=32 --set output=runs/rank32`
    """
    from qlora_kit.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides or [])
    made = plan_recipe(recipe)
    require_fit(made, recipe_file)
    from qlora_kit.training.loop import train as run_training

    recipe = made.placed(recipe)
    result = run_training(recipe, resume=resume, restart=restart, plan=made.to_json())
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
    _print_json(found.to_json()) if as_json else print("\n".join(found.lines()))


# ------------------------------------------------------------------------------------------------ using a model


@app.command(name="eval")
def evaluate_command(
    model: ModelPath,
    data: Annotated[Path, typer.Option(help="Held-out examples, jsonl.")],
    adapter: Annotated[str | None, typer.Option(help="Adapter folder.")] = None,
    format: Annotated[str, typer.Option(help="auto | chat | alpaca | completion | text")] = "auto",
    learn: Annotated[str, typer.Option(help="completion | all: which tokens count.")] = "completion",
    seq_len: Annotated[int, typer.Option(help="Longest example, in tokens.")] = 2048,
    quantization: Quantization = "auto",
    placement: PlacementOption = "auto",
    any_base: AnyBase = False,
    as_json: AsJson = False,
) -> None:
    """Loss, perplexity and number of learned tokens on held-out data.

    Example: `qlora-kit eval --model models/m --adapter runs/r/adapter --data data/eval.jsonl`
    """
    from qlora_kit.data.batches import eval_batches
    from qlora_kit.data.tokenize import load_examples, load_tokenizer
    from qlora_kit.planning.components import AUTO_LOSS_CHUNK_TOKENS
    from qlora_kit.recipe import Data
    from qlora_kit.training.evaluate import evaluate

    settings = section(Data, train=str(data), format=format, learn=learn, seq_len=seq_len)
    examples, _ = load_examples(data, settings, load_tokenizer(model_folder(model)))
    batches = eval_batches(examples, micro_batch=1, seq_len=seq_len, packing=True, pad_id=0)
    base = load_model(model, [adapter] if adapter else [], quantization, any_base, placement)
    evaluation = evaluate(base, batches, AUTO_LOSS_CHUNK_TOKENS)
    if as_json:
        _print_json(evaluation.to_json())
    else:
        print(f"loss {evaluation.loss:.4f}  perplexity {evaluation.perplexity:.3f}  tokens {evaluation.tokens:,}")


@app.command()
def generate(
    model: ModelPath,
    prompt: Annotated[str, typer.Option(help="What the user says; rendered with the model's chat template.")],
    adapter: Annotated[list[str] | None, typer.Option(help="Adapter folder; several add up.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as plain text, without a template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of sampling at a temperature above 0.")] = 0,
    quantization: Quantization = "auto",
    placement: PlacementOption = "auto",
    any_base: AnyBase = False,
) -> None:
    """Text from a base, a base with adapters, or a merged model.

    Example: `qlora-kit generate --model models/m --adapter runs/r/adapter --prompt "Why is the sky blue?"`
    """
    from qlora_kit.data.tokenize import load_tokenizer
    from qlora_kit.generation import generate as run_generation

    tokenizer = load_tokenizer(model_folder(model))
    base = load_model(model, list(adapter or []), quantization, any_base, placement)
    messages = [{"role": "system", "content": system}] if system else []
    asked = prompt if raw else [*messages, {"role": "user", "content": prompt}]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    for answer in run_generation(base, tokenizer, [asked], **options):
        print(answer)


@app.command()
def merge(
    model: ModelPath,
    adapter: Annotated[Path, typer.Option(help="Adapter folder.")],
    out: Annotated[Path, typer.Option(help="New folder for the merged model.")],
    dtype: Annotated[
        DType, typer.Option(help="Of the written weights; arithmetic is fp32, rounded once.")
    ] = DType.float16,
    onto: Annotated[
        Onto,
        typer.Option(
            help="original weights, their dequantized 4-bit copies, or auto: what the adapter was trained beside."
        ),
    ] = Onto.auto,
    verify: Annotated[
        Path | None, typer.Option(help="Held-out jsonl: reload with plain transformers and compare losses.")
    ] = None,
    any_base: AnyBase = False,
    as_json: AsJson = False,
) -> None:
    """Write a full-precision model: base + adapter, tensor by tensor.

    Memory stays at a few tensors, whatever the model. With `--verify` the folder is reloaded from disk by plain
    transformers in a fresh process, and its loss must equal the live adapter model's within 0.01 nats (else exit 4).

    Example: `qlora-kit merge --model models/m --adapter runs/r/adapter --out runs/r/merged --verify data/eval.jsonl`
    """
    from qlora_kit.export.merge import merge_model
    from qlora_kit.units import format_bytes

    folder = model_folder(model)
    if verify is not None:
        check_data(folder, verify)
    report = merge_model(folder, adapter, out, dtype=dtype.value, onto=onto.value, any_base=any_base)
    result = report.to_json()
    if verify is not None:
        result["proof"] = prove_merged(folder, adapter, out, verify, any_base)
    if as_json:
        _print_json(result)
        return
    print(
        f"{out}: {format_bytes(report.bytes_written)} {report.dtype}, {report.merged_tensors} tensors merged onto the "
        f"{report.onto} weights, {report.copied_tensors} copied"
    )
    if verify is not None:
        proof = result["proof"]
        print(
            f"reloaded by plain transformers: held-out loss {proof['merged_loss']:.4f}, "
            f"adapter model {proof['live_loss']:.4f}"
        )


@app.command()
def quantize(
    model: ModelPath,
    out: Annotated[Path, typer.Option(help="New folder for the 4-bit checkpoint.")],
    quant_type: Annotated[QuantType, typer.Option(help="The 4-bit type of the weights.")] = QuantType.nf4,
    double_quant: Annotated[
        bool, typer.Option(help="Quantize the scales too: 4.127 bits per weight instead of 4.5.")
    ] = True,
    dtype: Annotated[
        DType, typer.Option(help="Of what stays unquantized, and of weights before; `model.dtype` of the recipe.")
    ] = DType.bfloat16,
    as_json: AsJson = False,
) -> None:
    """Write a 4-bit checkpoint that this kit and plain transformers load.

    Memory stays at a few tensors, whatever the model. Training from it gives what training from the original gives,
    and adapters fit both.

    Example: `qlora-kit quantize --model models/m --out models/m-nf4`
    """
    from qlora_kit.base.quantize_model import quantize_model
    from qlora_kit.base.source import resolve_folder
    from qlora_kit.units import format_bytes

    folder = resolve_folder(model)
    report = quantize_model(folder, out, quant_type=quant_type.value, double_quant=double_quant, dtype=dtype.value)
    if as_json:
        _print_json(report.to_json())
        return
    print(
        f"{out}: {format_bytes(report.bytes_written)} of {format_bytes(report.bytes_read)}, "
        f"{report.quantized_tensors} tensors in {report.quant_type}, {report.copied_tensors} in {report.dtype}"
    )


@adapter_app.command("show")
def adapter_show(adapter: Annotated[Path, typer.Argument(metavar="ADAPTER")], as_json: AsJson = False) -> None:
    """Ranks, norms and singular values of an adapter. Not built yet."""
    not_built("adapter show")


@adapter_app.command("compose")
def adapter_compose(
    adapters: Annotated[list[Path], typer.Argument(metavar="A B...")],
    out: Annotated[Path, typer.Option(help="New folder for the composed adapter.")],
    weights: Annotated[str, typer.Option(help="Comma-separated, such as 0.7,0.3.")] = "",
    method: Annotated[str, typer.Option(help="linear | cat | svd")] = "linear",
) -> None:
    """Combine adapters of one base. Not built yet."""
    not_built("adapter compose")


# ------------------------------------------------------------------------------------------------ recipes and machine


@recipes_app.command("list")
def recipes_list(as_json: AsJson = False) -> None:
    """The prepared recipes, with what each is for."""
    from qlora_kit.prepared import prepared_recipes

    found = [{"name": name, "about": about, "path": str(path)} for name, (path, about) in prepared_recipes().items()]
    if as_json:
        _print_json({"recipes": found})
        return
    for entry in found:
        print(f"{entry['name']:<28} {entry['about']}")


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
    _print_json(report) if as_json else print_report(report)


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
        _print_json({"device": str(where), "proofs": [vars(proof) for proof in proofs]})
    if not all(proof.passed for proof in proofs):
        raise typer.Exit(1)
