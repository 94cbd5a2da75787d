"""Do the prepared recipes keep their promise? Each is planned for its card, then takes a step on a simulated one.

    python -m tools.prove_recipes                       all of them: a table, planned beside measured
    python -m tools.prove_recipes llama-3.1-8b-24gb     some of them
    python -m tools.prove_recipes --write               plan only, and write the `# planned:` lines anew

Why: a recipe that runs out of memory is worse than none. How: card and free host memory are read from the recipe's own
head, so every machine plans the same; the step is that of `profiling.simulate`, the real training code with the
budget as its limit. Imported by: tests.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

from qlora_kit import files
from qlora_kit.planning.planner import Plan, make_plan
from qlora_kit.prepared import CPU, Prepared, Promise, prepared_recipes
from qlora_kit.profiling.simulate import measure
from qlora_kit.recipe import Recipe, load_recipe
from qlora_kit.units import format_bytes

# What a recipe's model is in the catalogue, where it is a folder that `make quickstart` prepares.
OVERRIDES = {"quickstart": ("model.path=smollm2-135m", "train.device=cpu")}


def plan_prepared(prepared: Prepared) -> tuple[Recipe, Plan]:
    """A prepared recipe and its plan for the card and the free host memory that its head names."""
    recipe = load_recipe(prepared.path, OVERRIDES.get(prepared.name, ()))
    promise = prepared.promise
    with mock.patch("qlora_kit.planning.decide.host_memory_bytes", lambda: promise.host_free_bytes):
        return recipe, make_plan(recipe, gpu=None if promise.card == CPU else promise.card)


def promised(prepared: Prepared, plan: Plan) -> Promise:
    """What the head should say by this plan."""
    phases = plan.phases
    return Promise(
        peak_bytes=plan.peak_bytes,
        budget_bytes=plan.budget_bytes,
        card=prepared.promise.card,
        host_bytes=max(phase.host_bytes for name, phase in phases.items() if name != "merge"),
        host_free_bytes=prepared.promise.host_free_bytes,
        disk_bytes=phases["train"].disk_bytes + phases["save"].disk_bytes,
        base_bytes=phases["merge"].disk_bytes,
    )


def write_promise(prepared: Prepared) -> None:
    """Put the planner's figures into the recipe's head."""
    _, plan = plan_prepared(prepared)
    text = prepared.path.read_text(encoding="utf-8")
    files.write_text(prepared.path, text.replace(str(prepared.promise), str(promised(prepared, plan))))


@dataclass(frozen=True)
class Kept:
    """A recipe's step: bytes allowed, planned and measured on the device (without the runtime, which is not simulated),
    and of pinned host memory.
    """

    name: str
    limit_bytes: int
    planned_bytes: int
    measured_bytes: int
    planned_host_bytes: int
    measured_host_bytes: int

    @property
    def ratio(self) -> float:
        """Planned to measured."""
        return self.planned_bytes / self.measured_bytes


def prove(prepared: Prepared) -> Kept:
    """Run a step of a recipe at full size on a simulated device with its budget and no more.

    Micro-batches after the second group repeat it, gradients there, so they are left out.
    Raises: torch.OutOfMemoryError: the promise is not kept.
    """
    recipe, plan = plan_prepared(prepared)
    runtime, group = plan.components["runtime"], plan.settings["memory"]["micro_batches_together"]
    limit = plan.budget_bytes - runtime
    with tempfile.TemporaryDirectory() as folder:
        placed = plan.placed(recipe)
        fewer = {"grad_accumulation": min(2 * group, placed.train.grad_accumulation)}
        train = placed.train.model_copy(update=fewer)
        measured = measure(placed.model_copy(update={"train": train, "output": f"{folder}/run"}), limit)
    return Kept(
        name=prepared.name,
        limit_bytes=limit,
        planned_bytes=plan.peak_bytes - runtime,
        measured_bytes=measured.device_bytes,
        planned_host_bytes=plan.phases["train"].host_bytes,
        measured_host_bytes=measured.host_bytes,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    known = prepared_recipes()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=", ".join(known))
    parser.add_argument("--write", action="store_true", help="plan only, and write the `# planned:` lines anew")
    given = parser.parse_args(arguments)
    if unknown := set(given.recipes) - known.keys():
        parser.error(f"no such recipe: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    wanted = [prepared for name, prepared in known.items() if not given.recipes or name in given.recipes]
    if given.write:
        for prepared in wanted:
            write_promise(prepared)
        return
    print("| recipe | limit | planned | measured | planned / measured | host planned | host measured |")
    print("|---|---|---|---|---|---|---|")
    for prepared in wanted:
        kept = prove(prepared)
        sizes = map(format_bytes, (kept.limit_bytes, kept.planned_bytes, kept.measured_bytes))
        hosts = map(format_bytes, (kept.planned_host_bytes, kept.measured_host_bytes))
        print(f"| {kept.name} | {' | '.join(sizes)} | {kept.ratio:.4f} | {' | '.join(hosts)} |", flush=True)


if __name__ == "__main__":
    main()
