"""What several commands do: from their options to recipes, plans, models and proofs. Imported by: cli, plan_command,
model_commands.

Heavy imports stand inside the functions, so that `plan` and `--help` never import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import BudgetError, RecipeError

if TYPE_CHECKING:
    from qlora_kit.base.loader import Base
    from qlora_kit.base.streaming import Placement
    from qlora_kit.export.merge import Merge
    from qlora_kit.export.output import MergeReport
    from qlora_kit.planning.planner import Plan
    from qlora_kit.planning.shapes import ModelShapes
    from qlora_kit.profiling.profiler import Profile
    from qlora_kit.recipe import Model, Recipe


def is_recipe(target: str) -> bool:
    """Whether `plan`'s argument names a recipe; else it names a model."""
    return target.endswith((".yaml", ".yml"))


def recipe_or_model(target: str, overrides: list[str]) -> Recipe:
    """The recipe of a YAML file, or the default one for a model.

    Raises: RecipeError: what is wrong with it, by file, line and key.
    """
    from qlora_kit.recipe import load_recipe, recipe_for_model

    if is_recipe(target):
        return load_recipe(Path(target), overrides)
    return recipe_for_model(target, overrides)


def plan_recipe(
    recipe: Recipe,
    budget: str | None = None,
    gpu: str | None = None,
    stack: str = "kit",
    shapes: ModelShapes | None = None,
) -> Plan:
    """The plan of a recipe for `--budget`, `--gpu` and `--stack`; of a model of known shapes, if given.

    Says what would keep the recipe's adapter from being served.

    Raises: RecipeError: the budget is no size, or the card unknown.
    """
    from qlora_kit.console import note
    from qlora_kit.planning.planner import make_plan, read_shapes
    from qlora_kit.planning.stack_plan import plan_in_stack
    from qlora_kit.serving import serving_notes
    from qlora_kit.units import parse_bytes

    try:
        budget_bytes = None if budget is None else parse_bytes(budget)
    except ValueError as error:
        raise RecipeError(f"--budget: {error}") from None
    if stack != "kit":
        return plan_in_stack(recipe, stack, budget_bytes=budget_bytes, gpu=gpu, shapes=shapes)
    shapes = shapes or read_shapes(recipe)
    plan = make_plan(recipe, budget_bytes=budget_bytes, gpu=gpu, shapes=shapes)
    for text in serving_notes(recipe, shapes):
        note(text)
    return plan


def require_fit(plan: Plan, recipe_file: Path) -> None:
    """Raises: BudgetError: the plan does not fit; with what would."""
    if not plan.fits:
        from qlora_kit.planning.report import verdict

        raise BudgetError("\n  ".join([f"{recipe_file}: {verdict(plan)}", *plan.suggestions]))


def write_profile(found: Profile, model: str, folder: Path) -> None:
    """Write report.html into a folder, and timeline.png if matplotlib is there; say where they are."""
    from qlora_kit import files
    from qlora_kit.console import note
    from qlora_kit.profiling import timeline

    title, drawn = f"{model}: the memory of one step", timeline.layers(found.series)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "report.html", timeline.page(title, found, timeline.svg(drawn)))
    note(f"{folder / 'report.html'}: the memory of a step over time")
    try:
        files.write_bytes(folder / "timeline.png", timeline.png(drawn, title))
    except RecipeError as problem:
        note(str(problem))


def model_folder(model: str) -> Path:
    """The model's local folder, its config.json checked first: a tokenizer would blame itself for what is wrong in it.

    Raises: ModelError: no such model, unsupported, or a field of its config is absent or absurd.
    """
    from qlora_kit.base.source import resolve_folder
    from qlora_kit.planning.shapes import model_shapes, read_config

    folder = resolve_folder(model)
    model_shapes(*read_config(str(folder)))
    return folder


def load_model(
    model: str,
    adapters: list[str],
    quantization: str,
    any_base: bool,
    placement: str = "device",
    *,
    add_up: bool = True,
) -> Base:
    """The base in its own dtype, its blocks where `--placement` says.

    Args:
        adapters: loaded as `adapter-0` and so on.
        add_up: make all of them active at once; else the last one is.
    """
    from pydantic import ValidationError

    from qlora_kit.adapters.inject import activate
    from qlora_kit.adapters.store import PROVENANCE, load_adapter, provenance
    from qlora_kit.base.device import pick_device
    from qlora_kit.base.loader import load_base
    from qlora_kit.errors import ModelError
    from qlora_kit.planning.shapes import read_config
    from qlora_kit.recipe import Model
    from qlora_kit.training.blocks import attach

    if quantization not in ("auto", "nf4", "fp4", "none"):
        raise RecipeError(f"--quantization: auto, nf4, fp4 or none, found {quantization!r}")
    folder = model_folder(model)
    record = provenance(Path(adapters[0])) if adapters else {}
    config, source = read_config(str(folder))
    stored_dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    stored_kind = (config.get("quantization_config") or {}).get("bnb_4bit_quant_type", "none")
    if stored_dtype == "float16" and pick_device().type == "cpu":
        stored_dtype = "float32"  # the same values; products in fp16 are slow on CPUs
    try:
        settings = Model(
            path=str(folder),
            quantization=record.get("quantization", stored_kind) if quantization == "auto" else quantization,  # type: ignore[arg-type]
            double_quant=record.get("double_quant", True),
            dtype=record.get("dtype", stored_dtype),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = Path(adapters[0]) / PROVENANCE if first["loc"][0] in record else Path(source)
        raise ModelError(f"{where}: {first['loc'][0]}: {first['msg'].lower()}, found {first['input']!r}") from None
    base = load_base(settings, pick_device(), _placed(settings, placement))
    if base.streamer is not None:
        attach(base)
    names = [f"adapter-{index}" for index in range(len(adapters))]
    for name, adapter in zip(names, adapters):
        load_adapter(base, Path(adapter), name, any_base=any_base)
    if add_up:
        activate(base, names)
    return base


def _placed(settings: Model, placement: str) -> Placement:
    """Where the weights go; `auto` as a training run of 1,024 tokens would have them."""
    from qlora_kit.base.quantize_model import is_quantized
    from qlora_kit.planning.planner import make_plan
    from qlora_kit.recipe import Memory, recipe_for_model
    from qlora_kit.training.run import placement_of

    if is_quantized(Path(settings.path)):
        settings = settings.model_copy(update={"quantization": "nf4"})
    changes = {"model": settings, "memory": section(Memory, placement=placement)}
    recipe = recipe_for_model(settings.path).model_copy(update=changes)
    return placement_of(make_plan(recipe).placed(recipe))


def section(kind: Any, **values: Any) -> Any:
    """A section of the recipe from command-line options. Raises: RecipeError: names the option."""
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise RecipeError(f"--{option}: {first['msg'].lower()}, found {first['input']!r}") from None


def tokenizer_of(folder: Path, adapters: Sequence[str | Path]) -> Any:
    """The tokenizer beside the adapters, where tokens were added; else the model's.

    Raises: ModelError: it cannot be loaded, or two adapters were trained with different ones.
    """
    from qlora_kit.adapter_files import has_tokenizer
    from qlora_kit.data.tokenize import load_tokenizer
    from qlora_kit.errors import ModelError

    places = {Path(adapter): Path(adapter) if has_tokenizer(Path(adapter)) else folder for adapter in adapters}
    loaded = {place: load_tokenizer(place) for place in dict.fromkeys([*places.values()] or [folder])}
    first = next(iter(places), folder)
    tokenizer = loaded[places.get(first, folder)]
    for adapter, place in places.items():
        if difference := _difference(tokenizer, loaded[place]):
            raise ModelError(
                f"{first} and {adapter}: their tokenizers differ ({difference}), so one text would be other tokens to "
                "each; use them one at a time"
            )
    return tokenizer


def _difference(one: Any, other: Any) -> str | None:
    """What two tokenizers differ in, of what a prompt or an answer shows."""
    if one.get_vocab() != other.get_vocab():
        return "vocabulary"
    if one.chat_template != other.chat_template:
        return "chat template"
    return "end token" if one.eos_token_id != other.eos_token_id else None


def warn_of_other_quantization(base: Base, adapters: Sequence[str]) -> None:
    """Say which adapters were trained beside another quantization than the base has now; PEFT's record none."""
    from qlora_kit.adapters.store import provenance
    from qlora_kit.console import warn

    now = _quantization(base.settings.quantization, base.settings.double_quant)
    for adapter in adapters:
        record = provenance(Path(adapter))
        then = _quantization(record.get("quantization"), record.get("double_quant", True))
        if record.get("quantization") and then != now:
            warn(
                f"{adapter}: trained beside a base in {then}, this one is in {now}; answers can differ from training's"
            )


def _quantization(quant_type: str | None, double_quant: bool) -> str:
    if quant_type == "none":
        return "16 or 32 bits"
    return f"{quant_type} with double quantization" if double_quant else f"{quant_type}"


def held_out_rows(folder: Path, data: Path, adapter: Path) -> Any:
    """Ids and targets of held-out documents. Raises: DataError: a line cannot be used."""
    from qlora_kit.data.tokenize import load_examples
    from qlora_kit.export.verify import rows_of
    from qlora_kit.recipe import Data

    tokenizer = tokenizer_of(folder, [adapter])
    return rows_of(load_examples(data, Data(train=str(data), seq_len=2048), tokenizer)[0])


def merge_proved(merge: Merge, out: Path, rows: Any, *, choose: bool, any_base: bool) -> MergeReport:
    """Merge and prove; see `export.choose.merge_and_prove`. The live logits wait in the system's temporary folder."""
    import tempfile

    from qlora_kit.export.choose import merge_and_prove

    def load(quantization: str) -> Base:
        return load_model(str(merge.base.folder), [str(merge.adapter)], quantization, any_base)

    with tempfile.TemporaryDirectory(prefix="qlora-kit-") as scratch:
        return merge_and_prove(merge, out, rows, Path(scratch), load=load, choose=choose)
