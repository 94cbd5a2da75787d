"""The plan: whether a recipe fits, what each component and phase takes, and what to change if it does not.

Why: a run that cannot fit is refused before torch is imported, in well under a second.
How: config -> shapes -> what `auto` comes to (decide) -> what each phase takes (phases) -> peak against the device's
memory (hardware); and how long a step takes (timing). When it does not fit, changes are tried, each by planning again
(suggest); when it does, how far it could go (room).
Imports no torch. Imported by the command line, training.memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qlora_kit.optimizers import OPTIMIZERS
from qlora_kit.planning import components
from qlora_kit.planning.components import Ledger
from qlora_kit.planning.decide import decided, with_memory
from qlora_kit.planning.hardware import Device, device_for
from qlora_kit.planning.moments import training_moments
from qlora_kit.planning.phases import Phase, peak_bytes, peak_moment, phases
from qlora_kit.planning.quantities import host_blocks, resident_blocks, tokens
from qlora_kit.planning.room import Room, least_bytes, room
from qlora_kit.planning.runtime import is_roomy, runtime_bytes
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config
from qlora_kit.planning.suggest import Change, Cost, changed, changes_of_a_run, single_changes, suggestions
from qlora_kit.planning.timing import Estimate, estimate
from qlora_kit.recipe import Memory, Recipe

# Keys that a plan gives to the run: those that change no bit of its result.
DECIDED = sorted(Memory.model_fields.keys() - {"budget", "loss_chunk_tokens", "mlp_tile_tokens", "on_oom"})


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on a device.

    Attributes:
        device: what was planned for; its memory is the budget.
        components: bytes of each component at the training peak, on the device; they add up to the training phase.
        peak_moment: which moment of a training step that is.
        moments: the ledger at each moment of a step that can be its peak (`moments.training_moments`).
        phases: load, train, eval, save, merge.
        trainable_parameters, base_parameters: of the adapter, of the base (a tied head counted once).
        resident_blocks, streamed_blocks, host_blocks: how many blocks' weights live on the device, how many elsewhere,
            and how many of these in host memory (the rest on disk).
        settings: the recipe as it would run, every `auto` decided.
        roomy: whether freed memory can be kept for speed; see `runtime`.
        estimated: the time of a step, where the device's rates are known.
        suggestions: lines to follow when it does not fit, each with what it saves and what time it costs.
        room: how far seq_len or micro_batch could go, when it fits; `make_plan` looks for it.
        stack: whose training this is: "kit", or a name of STACKS.
        kit_peak_bytes: of another stack's plan: what this kit needs at its peak; None: it cannot train this model.
    """

    device: Device
    components: Ledger
    peak_moment: str
    moments: dict[str, Ledger]
    phases: dict[str, Phase]
    trainable_parameters: int
    base_parameters: int
    resident_blocks: int
    streamed_blocks: int
    host_blocks: int
    settings: dict[str, Any]
    roomy: bool = False
    estimated: Estimate | None = None
    suggestions: tuple[str, ...] = ()
    room: Room | None = None
    stack: str = "kit"
    kit_peak_bytes: int | None = None

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
        """The recipe with its memory as this plan has decided it, as it is to run."""
        return with_memory(recipe, **{key: self.settings["memory"][key] for key in DECIDED})

    def to_json(self) -> dict[str, Any]:
        """The object that `plan --json` prints and a run keeps as plan.json; schema 1 of the contract.

        Of another stack it also has "stack" and "kit_peak_bytes".
        """
        elsewhere = {} if self.stack == "kit" else {"stack": self.stack, "kit_peak_bytes": self.kit_peak_bytes}
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
            "estimated": self.estimated and self.estimated.to_json(),
            "room": self.room and dict(vars(self.room)),
            "roomy": self.roomy,
            **elsewhere,
        }


def make_plan(
    recipe: Recipe, *, budget_bytes: int | None = None, gpu: str | None = None, shapes: ModelShapes | None = None
) -> Plan:
    """Plan a recipe from the config of its model alone; nothing is loaded.

    Args:
        recipe: what to run; `model.path` may also be a name of the built-in catalogue.
        budget_bytes: `--budget`; goes before the recipe's `memory.budget`.
        gpu: `--gpu`, a card of the catalogue; with a budget too, the smaller of the two counts.
        shapes: of the model, where they are known by other means than a row of ARCHITECTURES.
    Raises: ModelError: no usable config. RecipeError: unknown card, or targets that select nothing.
    """
    if budget_bytes is None and recipe.memory.budget != "auto":
        budget_bytes = recipe.memory.budget
    shapes = shapes or read_shapes(recipe)
    device = device_for(recipe.train.device, gpu, budget_bytes)
    plan = plan_shapes(shapes, recipe, device)
    if not plan.fits:
        return plan
    return replace(plan, room=room(shapes, recipe.memory, plan.placed(recipe), device))


def read_shapes(recipe: Recipe) -> ModelShapes:
    """The shapes of a recipe's model. Raises: ModelError: no usable config."""
    return model_shapes(*read_config(recipe.model.path, recipe.model.revision))


def plan_shapes(shapes: ModelShapes, recipe: Recipe, device: Device) -> Plan:
    """Plan a recipe for known shapes and device; suggestions included when it does not fit."""
    plan = _plan(shapes, decided(shapes, recipe, device), device)
    if plan.fits:
        return plan

    before = _cost(plan.peak_bytes, recipe, plan.estimated)
    cost = _costs(shapes, device)
    return replace(plan, suggestions=tuple(suggestions(recipe, single_changes(recipe), device, before, cost)))


def changes_that_fit(recipe: Recipe, budget_bytes: int) -> list[str]:
    """Suggestions, in values, for a recipe without `auto` that ran and is to take less; none if it is planned to."""
    shapes, device = read_shapes(recipe), device_for(recipe.train.device, None, budget_bytes)
    plan = _plan(shapes, recipe, device)
    before = _cost(plan.peak_bytes, recipe, plan.estimated)
    changes = changes_of_a_run(recipe, lambda eased: decided(shapes, eased, device))
    return suggestions(recipe, changes, device, before, _costs(shapes, device))


def _costs(shapes: ModelShapes, device: Device) -> Callable[[Recipe], Cost]:
    """What a recipe takes on the device, its `auto` decided."""

    def cost(changed_recipe: Recipe) -> Cost:
        if device.kind != "cpu":  # a look at what needs least spares deciding what cannot fit
            least = least_bytes(shapes, changed_recipe.memory, changed_recipe, device)
            if least > device.memory_bytes:
                return Cost(least, None)
        run = decided(shapes, changed_recipe, device)
        return _cost(peak_bytes(shapes, run, device), run, estimate(shapes, run, device))

    return cost


def _cost(peak: int, recipe: Recipe, time: Estimate | None) -> Cost:
    return Cost(peak, time.step_s / (tokens(recipe) * recipe.train.grad_accumulation) if time else None)


def _plan(shapes: ModelShapes, recipe: Recipe, device: Device) -> Plan:
    """The plan of a recipe without an `auto`."""
    moment, ledger = peak_moment(shapes, recipe, device)
    resident = resident_blocks(shapes, recipe)
    return Plan(
        device=device,
        components=ledger,
        peak_moment=moment,
        moments=training_moments(shapes, recipe, runtime_bytes(shapes, recipe, device)),
        phases=phases(shapes, recipe, device),
        trainable_parameters=components.trainable_parameters(shapes, recipe),
        base_parameters=shapes.total_parameters,
        resident_blocks=resident,
        streamed_blocks=shapes.layers - resident,
        host_blocks=host_blocks(shapes, recipe),
        settings=_settings(recipe, device),
        roomy=is_roomy(shapes, recipe, device),
        estimated=estimate(shapes, recipe, device),
    )


def _settings(recipe: Recipe, device: Device) -> dict[str, Any]:
    """The recipe as it would run on the device: with device, budget, chunk and optimizer, it has no `auto` left."""
    unpaged = OPTIMIZERS[recipe.train.optimizer].unpaged
    change: Change = {
        "train.device": device.kind,
        "memory.budget": device.memory_bytes,
        "memory.loss_chunk_tokens": components.loss_chunk_tokens(recipe),
        "memory.mlp_tile_tokens": recipe.memory.tile_tokens or "full",
    }
    if unpaged is not None and device.kind != "cuda":
        change["train.optimizer"] = unpaged
    return changed(recipe, change).model_dump(mode="json")
