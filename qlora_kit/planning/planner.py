"""The plan: whether a recipe fits, what each component and phase takes, and what to change if it does not.

Why: a run that cannot fit is refused before torch is imported, in well under a second.
How: config -> shapes -> components (components.py) -> phases -> peak against the device's memory (hardware.py). When it
does not fit, simple changes are tried, each by planning again, so that every suggestion is one that was computed.
All blocks are resident on the device. Imports no torch. Imported by the command line, training and profiling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qlora_kit.optimizers import OPTIMIZERS
from qlora_kit.planning import components as ledger
from qlora_kit.planning.components import DTYPE_BYTES, Ledger
from qlora_kit.planning.hardware import Device, device_for, host_memory_bytes
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config
from qlora_kit.recipe import Recipe
from qlora_kit.units import format_bytes

SMALLEST_SUGGESTED_SEQ_LEN = 256
SMALLEST_SUGGESTED_RANK = 8
RESIDENT_SHARE = 0.95  # of the budget that may be filled up with resident blocks
HOST_SHARE = 0.8  # of the host's memory that streamed blocks may take
MERGED_DTYPE_BYTES = 2  # merge writes float16 unless told otherwise
Change = dict[str, Any]  # dotted recipe key -> value


@dataclass(frozen=True)
class Phase:
    """Peak bytes of one phase: on the device, in host memory beside it, and written to disk."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on a device.

    Attributes:
        device: what was planned for; its memory is the budget.
        components: bytes of each component at the training peak, on the device; they add up to the training phase.
        peak_moment: which moment of a training step that is, "loss" or "block backward".
        phases: load, train, eval, save, merge.
        trainable_parameters, base_parameters: of the adapter, of the base (a tied head counted once).
        resident_blocks, streamed_blocks: where the blocks' 4-bit weights live.
        settings: the recipe as it would run, every `auto` decided.
        suggestions: lines to follow when it does not fit, each with the figure it was planned to.
    """

    device: Device
    components: Ledger
    peak_moment: str
    phases: dict[str, Phase]
    trainable_parameters: int
    base_parameters: int
    resident_blocks: int
    streamed_blocks: int
    settings: dict[str, Any]
    suggestions: tuple[str, ...] = ()

    @property
    def budget_bytes(self) -> int:
        """Memory that the device offers."""
        return self.device.memory_bytes

    @property
    def peak_phase(self) -> str:
        """The phase that needs most of the device; the first of equals, training before the others."""
        order = sorted(self.phases, key=lambda name: name != "train")
        return max(order, key=lambda name: self.phases[name].device_bytes)

    @property
    def peak_bytes(self) -> int:
        """Most that any phase needs on the device."""
        return self.phases[self.peak_phase].device_bytes

    @property
    def fits(self) -> bool:
        """Whether every phase stays within the budget."""
        return self.peak_bytes <= self.budget_bytes

    @property
    def total_parameters(self) -> int:
        """Base and adapter."""
        return self.base_parameters + self.trainable_parameters

    @property
    def trainable_percent(self) -> float:
        """Share of the adapter in all parameters, in percent."""
        return 100 * self.trainable_parameters / self.total_parameters

    def placed(self, recipe: Recipe) -> Recipe:
        """The recipe with its blocks where this plan has put them."""
        decided = {key: self.settings["memory"][key] for key in ("placement", "resident_blocks")}
        return recipe.model_copy(update={"memory": recipe.memory.model_copy(update=decided)})

    def to_json(self) -> dict[str, Any]:
        """The object that `plan --json` prints and a run keeps as plan.json; schema 1 of the contract."""
        return {
            "schema": 1,
            "fits": self.fits,
            "budget_bytes": self.budget_bytes,
            "peak_bytes": self.peak_bytes,
            "peak_phase": self.peak_phase,
            "components": dict(self.components),
            "phases": {name: dict(vars(phase)) for name, phase in self.phases.items()},
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
            "trainable_percent": self.trainable_percent,
            "resident_blocks": self.resident_blocks,
            "streamed_blocks": self.streamed_blocks,
            "settings": self.settings,
            "suggestions": list(self.suggestions),
        }


def make_plan(recipe: Recipe, *, budget_bytes: int | None = None, gpu: str | None = None) -> Plan:
    """Plan a recipe from the config of its model alone; nothing is loaded.

    Args:
        recipe: what to run; `model.path` may also be a name of the built-in catalogue.
        budget_bytes: `--budget`; goes before the recipe's `memory.budget`.
        gpu: `--gpu`, a card of the catalogue; with a budget too, the smaller of the two counts.
    Raises: ModelError: no usable config. RecipeError: unknown card, or targets that select nothing.
    """
    if budget_bytes is None and recipe.memory.budget != "auto":
        budget_bytes = recipe.memory.budget
    shapes = model_shapes(*read_config(recipe.model.path, recipe.model.revision))
    return plan_shapes(shapes, recipe, device_for(recipe.train.device, gpu, budget_bytes))


def plan_shapes(shapes: ModelShapes, recipe: Recipe, device: Device) -> Plan:
    """Plan a recipe for known shapes and device; suggestions included when it does not fit."""
    plan = _plan_placed(shapes, recipe, device)
    if plan.fits:
        return plan
    return replace(plan, suggestions=tuple(_suggestions(shapes, recipe, device)))


def _plan_placed(shapes: ModelShapes, recipe: Recipe, device: Device) -> Plan:
    return _plan_once(shapes, place_blocks(shapes, recipe, device), device)


def place_blocks(shapes: ModelShapes, recipe: Recipe, device: Device) -> Recipe:
    """The recipe with `memory.placement` and `memory.resident_blocks` decided: as much on the device as fits.

    `auto` puts all blocks on the device; where they do not fit, the others into host memory, or else on disk. On a CPU
    host memory is the device, so there the disk is the only other place. If nothing fits, all stay on the device: the
    suggestions then say what else would help.
    """
    wanted = recipe.memory.placement
    if wanted == "device":
        return recipe
    if wanted == "auto" and _plan_once(shapes, recipe, device).fits:
        return changed(recipe, {"memory.placement": "device"})
    on_host = (
        device.kind != "cpu" and shapes.layers * ledger.block_weights(shapes, recipe) < HOST_SHARE * host_memory_bytes()
    )
    tier = wanted if wanted != "auto" else "host" if on_host else "disk"
    placed = changed(recipe, {"memory.placement": tier})
    if tier == "host" and device.kind == "cpu":  # the same memory
        return placed if recipe.memory.resident_blocks != "auto" else changed(recipe, {"memory.placement": "device"})
    if recipe.memory.resident_blocks == "auto":
        placed = changed(placed, {"memory.resident_blocks": _most_resident(shapes, placed, device)})
    if wanted == "auto" and not _plan_once(shapes, placed, device).fits:
        return changed(recipe, {"memory.placement": "device"})
    return placed


def _most_resident(shapes: ModelShapes, recipe: Recipe, device: Device) -> int:
    """Most resident blocks that leave some room for what is only estimated, at least one streamed; 0 if none does."""
    few, many = 0, shapes.layers - 1
    while few < many:
        middle = -(-(few + many) // 2)
        plan = _plan_once(shapes, changed(recipe, {"memory.resident_blocks": middle}), device)
        fits = plan.peak_bytes <= RESIDENT_SHARE * plan.budget_bytes
        few, many = (middle, many) if fits else (few, middle - 1)
    return few


def _plan_once(shapes: ModelShapes, recipe: Recipe, device: Device) -> Plan:
    moments = ledger.training_moments(shapes, recipe, device.runtime_bytes)
    peak_moment = max(moments, key=lambda name: ledger.total(moments[name]))
    return Plan(
        device=device,
        components=moments[peak_moment],
        peak_moment=peak_moment,
        phases=_phases(shapes, recipe, device, ledger.total(moments[peak_moment])),
        trainable_parameters=ledger.trainable_parameters(shapes, recipe),
        base_parameters=shapes.total_parameters,
        resident_blocks=(resident := ledger.resident_blocks(shapes, recipe)),
        streamed_blocks=shapes.layers - resident,
        settings=_settings(recipe, device),
    )


def _phases(shapes: ModelShapes, recipe: Recipe, device: Device, training_bytes: int) -> dict[str, Phase]:
    """Each phase's peak. The interpreter, its libraries and the tokenized data are counted nowhere.

    load: the base as it will lie, and one tensor on its way: the largest linear on the device before it is quantized,
        the largest tensor on the host as read. Adapter and optimizer come later.
    train: the highest moment of a step; block inputs on the host with activation offload, and there too the blocks of
        placement `host`, or two pinned buffers for those of `disk`.
    eval: as training without gradients, between two steps, so the optimizer's state is there.
    save: the static part; adapter and optimizer state pass through host memory; disk holds the kept checkpoints, one
        more while it is written, and the adapter on its own.
    merge: a command of its own, on the host, tensor by tensor: the largest linear as stored, in fp32, its update in
        fp32, and rounded, or the largest other tensor as stored and rounded; writes the whole model in 16 bits.
    """
    static = ledger.static_ledger(shapes, recipe, device.runtime_bytes)
    base = sum(static[name] for name in ("base_nf4", "quant_constants", "base_unquantized", "runtime"))
    largest, largest_linear = ledger.largest_tensor(shapes), ledger.largest_linear(shapes)
    away = (shapes.layers - ledger.resident_blocks(shapes, recipe)) * ledger.block_weights(shapes, recipe)
    streamed_bytes = away if recipe.memory.placement == "host" else 0
    if recipe.memory.placement == "disk" and device.kind != "cpu":
        streamed_bytes = ledger.slots(shapes, recipe)  # pinned, on the way from file to device
    evaluation = ledger.evaluation_moments(shapes, recipe, device.runtime_bytes)
    state = static["adapter"] + static["optimizer"]
    kept = (recipe.train.keep_checkpoints + 1) * state + static["adapter"]
    merging = max(largest_linear * 2 * (ledger.FP32 + MERGED_DTYPE_BYTES), largest * 2 * MERGED_DTYPE_BYTES)
    return {
        "load": Phase(base + ledger.workspace(shapes, recipe), largest * DTYPE_BYTES[recipe.model.dtype], 0),
        "train": Phase(training_bytes, streamed_bytes + ledger.offloaded_activations(shapes, recipe), 0),
        "eval": Phase(max(map(ledger.total, evaluation.values())), streamed_bytes, 0),
        "save": Phase(ledger.total(static), state, kept),
        "merge": Phase(0, merging, shapes.total_parameters * MERGED_DTYPE_BYTES),
    }


def _settings(recipe: Recipe, device: Device) -> dict[str, Any]:
    """The recipe as it would run on the device: device, budget, placement, chunk and optimizer decided."""
    unpaged = OPTIMIZERS[recipe.train.optimizer].unpaged
    decided: Change = {
        "train.device": device.kind,
        "memory.budget": device.memory_bytes,
        "memory.placement": "device" if recipe.memory.placement == "auto" else recipe.memory.placement,
        "memory.loss_chunk_tokens": ledger.loss_chunk_tokens(recipe),
    }
    if unpaged is not None and device.kind != "cuda":
        decided["train.optimizer"] = unpaged
    return changed(recipe, decided).model_dump(mode="json")


# --------------------------------------------------------------------------------------------- suggestions


def changed(recipe: Recipe, change: Change) -> Recipe:
    """The recipe with dotted keys set."""
    values = recipe.model_dump()
    for key, value in change.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return Recipe.model_validate(values)


def _changes(recipe: Recipe) -> Iterator[Change]:
    """Single changes that save memory, the one that costs least first: nothing, then time, then what is learned."""
    memory, train = recipe.memory, recipe.train
    if memory.placement == "device":
        yield {"memory.placement": "auto"}
    if memory.loss_chunk_tokens != "auto":
        yield {"memory.loss_chunk_tokens": "auto"}
    if train.micro_batch > 1:
        yield {"train.micro_batch": 1, "train.grad_accumulation": train.grad_accumulation * train.micro_batch}
    if OPTIMIZERS[train.optimizer].state_bits > 8:
        yield {"train.optimizer": "paged_adamw_8bit"}
    if not memory.gradient_checkpointing:
        yield {"memory.gradient_checkpointing": True}
    if recipe.model.quantization == "none":
        yield {"model.quantization": "nf4", "model.double_quant": True}
    elif not recipe.model.double_quant:
        yield {"model.double_quant": True}
    shorter = recipe.data.seq_len // 2
    while shorter >= SMALLEST_SUGGESTED_SEQ_LEN:
        yield {"data.seq_len": shorter}
        shorter //= 2
    smaller = recipe.adapter.rank // 2
    while smaller >= SMALLEST_SUGGESTED_RANK:
        yield {"adapter.rank": smaller, "adapter.alpha": recipe.adapter.alpha * smaller / recipe.adapter.rank}
        smaller //= 2


def _line(change: Change, plan: Plan) -> str:
    """The change as `--set` options to paste, with the peak that it was planned to."""
    options = " ".join(f"--set {key}={_text(value)}" for key, value in change.items())
    return f"{options}   ({format_bytes(plan.peak_bytes)} at the peak)"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _suggestions(shapes: ModelShapes, recipe: Recipe, device: Device) -> Iterator[str]:
    """Changes that make it fit: each that does alone (the mildest of a key), else the fewest first ones together.

    Every line was planned; if all of them together are not enough, the last line says what would be.
    """
    together: Change = {}
    alone: set[str] = set()
    for change in _changes(recipe):
        key = next(iter(change))
        plan = _plan_placed(shapes, changed(recipe, change), device)
        if key not in alone and plan.fits:
            alone.add(key)
            yield _line(change, plan)
    if alone:
        return
    smallest = _plan_placed(shapes, recipe, device)
    for change in _changes(recipe):
        plan = _plan_placed(shapes, changed(recipe, together | change), device)
        if plan.peak_bytes < smallest.peak_bytes:
            together, smallest = together | change, plan
        if smallest.fits:
            yield _line(together, smallest)
            return
    needed = f"no change of these settings makes it fit: the least is {format_bytes(smallest.peak_bytes)}"
    with_what = f" with {_line(together, smallest).partition('   ')[0]}" if together else ""
    yield f"{needed}{with_what}; take a device with more memory, or a smaller model"
