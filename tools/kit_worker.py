"""The process in which a benchmark runs this kit: `python -m tools.kit_worker RECIPE`, spoken to by `tools.harness`.

Why a recipe: it is the real training code that is measured, `training.run` and `training.loop`, from the placement of
the base to the step; only the data is made here, random token ids. Questions: `step` makes an optimizer step;
`components` counts the bytes of the tensors that the run holds, by the ledger's names, where these can be told apart.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from qlora_kit.base.device import pick_device
from qlora_kit.base.shards import save_tensors
from qlora_kit.base.source import libraries
from qlora_kit.planning.planner import make_plan
from qlora_kit.recipe import Recipe, load_recipe
from qlora_kit.training.loop import train_step
from qlora_kit.training.memory import static_bytes
from qlora_kit.training.run import Run, assemble, choose_heap, place_base
from qlora_kit.training.signals import StopRequest
from tools.harness import Answer, Questions, random_examples, serve

RANDOM_B = 0.01  # standard deviation


def build_run(recipe: Recipe, steps: int) -> Run:
    """The kit's `Run` on random data, `steps` steps of it different; built as `qlora-kit train` builds one."""
    plan = make_plan(recipe)
    device = pick_device(recipe.train.device)
    choose_heap(device, plan.roomy)
    base = place_base(recipe, device)
    rows = steps * recipe.train.grad_accumulation * recipe.train.micro_batch
    examples = random_examples(rows, recipe.data.seq_len, base.model.config.vocab_size)
    return assemble(recipe, base, examples, [], StopRequest())


def questions(recipe_path: Path, steps: int, gradients: Path | None) -> Questions:
    """Load the run, and answer for it.

    With `gradients` each step's are written there before the update, and B starts at random: with zero, A has none.
    """
    run = build_run(load_recipe(recipe_path), steps)
    generator = torch.Generator().manual_seed(run.recipe.train.seed)
    for name, value in run.parameters.items():
        if gradients is not None and "lora_B" in name:
            value.data.copy_(torch.randn(value.shape, generator=generator).mul_(RANDOM_B))
    seen: dict[str, int] = {}

    def before_update(*unused: Any) -> None:
        held = {name: value.grad for name, value in run.parameters.items() if value.grad is not None}
        seen["gradients"] = sum(value.nbytes for value in held.values())
        if gradients is not None:
            save_tensors(gradients, held)

    def step() -> Answer:
        line = train_step(run)
        return {key: line[key] for key in ("loss", "tokens", "device_peak_bytes")}

    run.optimizer.register_step_pre_hook(before_update)
    return {"step": step, "components": lambda: {"components": static_bytes(run) | seen}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=8, help="how many have data of their own")
    parser.add_argument("--gradients", type=Path, help="write each step's here")
    options = parser.parse_args()
    modules = libraries(load_recipe(options.recipe).model.path)
    serve(modules, lambda: questions(options.recipe, options.steps, options.gradients))


if __name__ == "__main__":
    main()
