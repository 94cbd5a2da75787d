"""What `plan` answers: the plan, the lengths of a data file if one is given, and what to do next. Imported by: cli.

Heavy imports stand inside the functions: a plan imports no torch but for an architecture without a row, which is built
on the meta device; only `--data` imports a tokenizer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.architectures import ARCHITECTURES, PLANNED_ONLY
from qlora_kit.commands import is_recipe, plan_recipe, recipe_or_model
from qlora_kit.console import note
from qlora_kit.errors import RecipeError

if TYPE_CHECKING:
    from qlora_kit.data.lengths import Lengths
    from qlora_kit.planning.planner import Plan
    from qlora_kit.planning.shapes import ModelShapes
    from qlora_kit.profiling.simulate import Simulated
    from qlora_kit.recipe import Recipe

FUSED_EXPERTS = (
    "its experts count as linears of their own, in 4 bits where the base is, as this kit would quantize them; "
    "transformers 5 stores them fused, which bitsandbytes leaves as they are"
)
OVER_BUDGET = 1.0  # added to the distance of a recipe for a larger device than there is


@dataclass(frozen=True)
class Answer:
    """What `plan` has to say.

    Attributes:
        target: the recipe or model that was asked about.
        lengths: of the data file, if one was given; the plan is then for its longest row.
        simulated: what the real code took on a simulated card, if that was asked for.
        untrained: the model's architecture, if this kit does not train it.
    """

    target: str
    plan: Plan
    lengths: Lengths | None = None
    simulated: Simulated | None = None
    untrained: str | None = None

    @property
    def fits(self) -> bool:
        """Whether the plan fits, and the simulation did if there was one."""
        return self.plan.fits and (self.simulated is None or self.simulated.refused is None)

    @property
    def next_step(self) -> str:
        """The command to go on with: train a recipe; for a model, copy the prepared recipe that is nearest."""
        if self.untrained is not None:
            return f"none here: this kit does not train model_type {self.untrained!r}"
        if is_recipe(self.target):
            return f"qlora-kit train {self.target}"
        name = nearest_recipe(self.plan)
        if name is None:
            return "qlora-kit recipes list, and copy the one that is nearest"
        return f"qlora-kit recipes copy {name} my.yaml, then put your model and data into it"

    @property
    def notes(self) -> list[str]:
        """What is known of the data, in lines."""
        return [] if self.lengths is None else self.lengths.describe()

    def to_json(self) -> dict[str, Any]:
        """The plan's object, with "data" if a file was given, and "simulated" if that was asked for."""
        more = {"data": self.lengths, "simulated": self.simulated}
        return self.plan.to_json() | {key: value.to_json() for key, value in more.items() if value is not None}

    def print(self) -> None:
        """The report on stdout."""
        from qlora_kit.console import stdout
        from qlora_kit.planning.report import print_plan

        print_plan(self.plan, stdout, self.next_step, self.notes)
        if self.simulated is not None:
            print("\n".join(self.simulated.lines(self.plan.components)))

    def write_html(self, path: Path) -> None:
        """The same as one html file. Raises: DiskError: it cannot be written."""
        from qlora_kit import files
        from qlora_kit.planning.html_report import html_report

        files.write_text(path, html_report(self.plan, self.next_step, self.notes))


def answer(
    target: str,
    overrides: list[str],
    budget: str | None = None,
    gpu: str | None = None,
    *,
    stack: str = "kit",
    data: Path | None = None,
    simulate: bool = False,
) -> Answer:
    """Plan a recipe or a model, in a stack, with a data file for its longest row; and run a step of it, simulated.

    Raises: RecipeError, ModelError, DataError: what is wrong, and where.
    """
    if simulate and stack != "kit":
        raise RecipeError(f"--simulate runs this kit's own code, so it cannot be asked about --stack {stack}")
    recipe, lengths = recipe_or_model(target, overrides), None
    shapes = _shapes(recipe)
    if data is not None:
        lengths = _lengths(recipe, data)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"seq_len": lengths.longest_row})})
    plan = plan_recipe(recipe, budget, gpu, stack, shapes)
    simulated = _simulated(plan, recipe) if simulate else None
    plan = _timed(plan, lengths, shapes) if lengths and plan.estimated else plan
    return Answer(target, plan, lengths, simulated, None if shapes.model_type in ARCHITECTURES else shapes.model_type)


def _shapes(recipe: Recipe) -> ModelShapes:
    """The shapes of the recipe's model: by its row, or else by building transformers' class of it, which is said.

    Raises: ModelError: no usable config, or an architecture that transformers does not know either.
    """
    from qlora_kit.planning.shapes import model_shapes, read_config

    config, source = read_config(recipe.model.path, recipe.model.revision)
    name = config.get("model_type")
    notes: list[str] = []
    if not isinstance(name, str) or name in ARCHITECTURES or name in PLANNED_ONLY or "text_config" in config:
        shapes = model_shapes(config, source, planned_only=True)
    else:
        shapes, notes = _built(config, source)
    if shapes.experts[0] > 1:
        notes.append(FUSED_EXPERTS)
    if name not in ARCHITECTURES:
        note("; ".join([f"model_type {name!r} is not one that this kit trains: planned only", *notes]))
    return shapes


def _built(config: dict[str, Any], source: str) -> tuple[ModelShapes, list[str]]:
    started = time.monotonic()
    from qlora_kit.base.meta_shapes import meta_shapes

    shapes, notes = meta_shapes(config, source)
    how = f"its shapes are those of transformers' class, built without memory in {time.monotonic() - started:.1f} s"
    return shapes, [how, "activations are an estimate", *notes]


def _simulated(plan: Plan, recipe: Recipe) -> Simulated:
    from qlora_kit.profiling.simulate import simulate

    return simulate(plan, recipe)


def _lengths(recipe: Recipe, data: Path) -> Lengths:
    """The file as the recipe's run would read it, with the tokenizer of its model."""
    from qlora_kit.data.lengths import measure
    from qlora_kit.data.tokenize import load_tokenizer

    folder = Path(recipe.model.path).expanduser()
    if not folder.is_dir():
        raise RecipeError(
            f"--data {data}: token lengths need the model's tokenizer, and {recipe.model.path!r} is no local folder; "
            "download the model and give its folder, such as --set model.path=models/m"
        )
    note(f"reading {data} with the tokenizer of {folder}")
    return measure(data, recipe, load_tokenizer(folder))


def _timed(plan: Plan, lengths: Lengths, shapes: ModelShapes) -> Plan:
    """The plan with the time of steps of mean rows, and of a run over the file."""
    from qlora_kit.planning.timing import estimate
    from qlora_kit.recipe import Recipe

    settings = Recipe.model_validate(plan.settings)
    steps = settings.train.steps or math.ceil((settings.train.epochs or 1) * lengths.steps_per_epoch)
    change = {
        "data": settings.data.model_copy(update={"seq_len": lengths.mean_row}),
        "train": settings.train.model_copy(update={"steps": steps, "epochs": None}),
    }
    return replace(plan, estimated=estimate(shapes, settings.model_copy(update=change), plan.device))


# ------------------------------------------------------------------------------------------------ which recipe to copy


def nearest_recipe(plan: Plan) -> str | None:
    """The prepared recipe whose model and memory are nearest to a plan's; None: none is for such a device.

    Distances are logarithmic: of the parameters, and half as heavy of the memory; of equals the shortest name.
    """
    candidates = []
    for name, parameters, memory_bytes in _prepared(plan.device.kind):
        distance = abs(math.log(parameters / plan.base_parameters))
        distance += abs(math.log(memory_bytes / plan.budget_bytes)) / 2
        candidates.append((distance + OVER_BUDGET * (memory_bytes > plan.budget_bytes), len(name), name))
    return min(candidates)[2] if candidates else None


def _prepared(kind: str) -> Iterator[tuple[str, int, int]]:
    """(name, parameters, memory) of each prepared recipe for a kind of device and a model of the catalogue."""
    from qlora_kit.planning.shapes import catalogue_entry, model_shapes
    from qlora_kit.prepared import CPU, prepared_recipes

    for prepared in prepared_recipes().values():
        entry = catalogue_entry(prepared.model)
        if entry and kind == ("cpu" if prepared.promise.card == CPU else "cuda"):
            parameters = model_shapes(entry["config"], prepared.name).total_parameters
            yield prepared.name, parameters, prepared.promise.budget_bytes
