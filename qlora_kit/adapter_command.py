"""The commands `adapter show`, `adapter compose` and `adapter resize`: on adapter folders alone, no base needed.

Results go to stdout, notes to stderr, as for all commands. Each imports torch only when it runs. Imported by: cli.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.errors import RecipeError, nearest
from qlora_kit.options import AsJson, print_json

if TYPE_CHECKING:
    from qlora_kit.adapters.compose import Composition, Interference
    from qlora_kit.adapters.inspect import Portrait
    from qlora_kit.adapters.resize import Cut

app = typer.Typer(help="Look at adapters, combine them, make them smaller.", no_args_is_help=True)
NOTABLE = 0.05  # relative error of a composition that is worth a note
METHODS = ("linear", "cat", "svd", "ties", "dare")
Out = Annotated[Path, typer.Option(help="New folder for the adapter that is made.")]


@app.command()
def show(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder.")],
    png: Annotated[Path | None, typer.Option(help="Also draw layers by modules there (needs matplotlib).")] = None,
    as_json: AsJson = False,
) -> None:
    """Ranks, alpha, norms, singular values and effective rank of each update, size on disk, and the base.

    A table over the layers for each module; `--json` has every linear with its singular values. Of a DoRA adapter
    s B A is shown, without its magnitudes.

    Example: `qlora-kit adapter show runs/r/adapter --png adapter.png`
    """
    from qlora_kit import files
    from qlora_kit.adapters import inspect
    from qlora_kit.console import note

    portrait = inspect.look(adapter)
    if png is not None:
        files.write_bytes(png, inspect.png(portrait))
        note(f"{png}: layers by modules")
    if as_json:
        print_json(portrait.to_json())
    else:
        print("\n".join([*_head(portrait), "", *inspect.table(portrait.updates)]))


def _head(portrait: Portrait) -> list[str]:
    from qlora_kit.units import format_bytes

    found = portrait.to_json()
    lines = [
        f"adapter      {found['adapter']}",
        f"on disk      {format_bytes(found['size_bytes'])}, {found['parameters']:,} parameters of {found['dtype']}",
        f"base         {found['base_model'] or 'not recorded'}",
        f"fingerprint  {found['base_fingerprint'] or 'not recorded: this adapter was not made here'}",
    ]
    if found["use_dora"]:
        lines.append("DoRA         below is s B A alone, without the magnitudes")
    elif found["other_tensors"]:
        lines.append(f"also holds   {len(found['other_tensors'])} other tensors, such as {found['other_tensors'][0]}")
    return lines


@app.command()
def compose(
    adapters: Annotated[list[Path], typer.Argument(metavar="A B...", help="Adapter folders of one base.")],
    out: Out,
    weights: Annotated[str, typer.Option(help="One for each adapter, such as 0.7,0.3; default: 1 each.")] = "",
    method: Annotated[str, typer.Option(help="linear | cat | svd | ties | dare")] = "linear",
    rank: Annotated[int, typer.Option(min=0, help="Of svd; 0: the largest of the adapters.")] = 0,
    density: Annotated[float, typer.Option(help="Of ties and dare: share of elements that is kept.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Of what dare drops.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Combine adapters of one base into one, and say how far the result is from their weighted sum.

    cat is exact, the ranks add up; svd is the nearest of a rank. linear, ties and dare add the factors element by
    element, as PEFT does, which also brings in products of one adapter's B with another's A: read the error.

    Example: `qlora-kit adapter compose runs/a/adapter runs/b/adapter --weights 0.7,0.3 --method cat --out both`
    """
    how = _composition(len(adapters), weights, method, rank, density, seed)
    from qlora_kit.adapters import compose as work
    from qlora_kit.console import note

    found = work.compose(adapters, how, out)
    if as_json:
        layers = {"total": work.together(found, "all").to_json(), "linears": [one.to_json() for one in found]}
        print_json({"out": str(out), "method": method, "weights": how.weights, **layers})
        return
    print("\n".join(_interference_table(found)))
    print(f"{out}: {method} of {len(adapters)} adapters")
    if (error := work.ratio(work.together(found, "all")) or 0.0) > NOTABLE:
        note(f"the composed update is {error:.0%} off the weighted sum; --method cat is exact")


def _composition(count: int, weights: str, method: str, rank: int, density: float, seed: int) -> Composition:
    """Raises: RecipeError: an option has no value that can be used."""
    if count < 2:
        raise RecipeError(f"adapter compose: at least two adapters expected, found {count}")
    if method not in METHODS:
        raise RecipeError(f"--method: one of {', '.join(METHODS)}, found {method!r}{nearest(method, list(METHODS))}")
    if rank and method != "svd":
        raise RecipeError(f"--rank: goes with --method svd only, found it with {method}")
    if not 0 < density <= 1:
        raise RecipeError(f"--density: above 0 and at most 1 expected, found {density}")
    try:
        numbers = tuple(float(word) for word in weights.split(",")) if weights else (1.0,) * count
    except ValueError:
        numbers = ()
    if len(numbers) != count or not any(numbers) or not all(abs(number) < 1e6 for number in numbers):
        raise RecipeError(f"--weights: {count} numbers expected, not all zero, such as 0.7,0.3; found {weights!r}")
    from qlora_kit.adapters.compose import Composition

    return Composition(method, numbers, rank, density, seed)


def _interference_table(found: list[Interference]) -> list[str]:
    """One line for each layer, over its linears, and one for all."""
    from qlora_kit.adapters.compose import cosines, ratio, together
    from qlora_kit.adapters.factors import place

    layers: dict[str, list[Interference]] = {}
    for one in found:
        layers.setdefault(place(one.linear)[0], []).append(one)
    count = len(found[0].norms)
    pairs = [f"cos {a + 1},{b + 1}" for a, b in combinations(range(count), 2)]
    heads = ["rank", *(f"norm {index + 1}" for index in range(count)), *pairs, "norm of sum", "error"]
    lines = [f"{'layer':<6}" + "".join(f"{head:>13}" for head in heads)]
    for one in [*(together(group, layer) for layer, group in layers.items()), together(found, "all")]:
        cells = [str(one.rank), *(f"{norm:.4g}" for norm in one.norms)]
        cells += ["-" if cosine is None else f"{cosine:+.4f}" for cosine in cosines(one.norms, one.inner)]
        relative = ratio(one)
        cells += [f"{one.wanted:.4g}", "-" if relative is None else f"{relative:.2e}"]
        lines.append(f"{one.linear:<6}" + "".join(f"{cell:>13}" for cell in cells))
    return lines


@app.command()
def resize(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder.")],
    out: Out,
    rank: Annotated[int | None, typer.Option(min=1, help="Highest rank of a linear.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Or: share of the squared singular values to keep, such as 0.99.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an adapter of a smaller rank by singular value decomposition, and state the error of each layer.

    A linear whose rank is not above the wanted one keeps its pair bit for bit.

    Example: `qlora-kit adapter resize runs/r/adapter --energy 0.99 --out smaller`
    """
    if (rank is None) == (energy is None):
        raise RecipeError("adapter resize: one of --rank and --energy expected, such as --rank 8 or --energy 0.99")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"--energy: above 0 and at most 1 expected, found {energy}")
    from qlora_kit.adapters import resize as work

    cuts = work.resize(adapter, out, rank=rank, energy=energy or 1.0)
    if as_json:
        print_json({"out": str(out), "total": work.total(cuts).to_json(), "linears": [cut.to_json() for cut in cuts]})
        return
    print("\n".join(_cut_table(cuts)))
    print(f"{out}: resized")


def _cut_table(cuts: list[Cut]) -> list[str]:
    """One line for each layer, over its linears, and one for all."""
    from qlora_kit.adapters.factors import place
    from qlora_kit.adapters.resize import total

    layers: dict[str, list[Cut]] = {}
    for cut in cuts:
        layers.setdefault(place(cut.linear)[0], []).append(cut)
    lines = [f"{'layer':<6}{'rank before':>13}{'ranks now':>13}{'norm':>13}{'error':>13}"]
    for name, group in [*layers.items(), ("all", cuts)]:
        one, low = total(group, name), min(cut.rank for cut in group)
        ranks = str(one.rank) if low == one.rank else f"{low}..{one.rank}"
        lines.append(f"{name:<6}{one.rank_before:>13}{ranks:>13}{one.norm:>13.4g}{one.relative_error:>13.2e}")
    return lines
