"""Is a plan what a step takes? Over a grid of models and switches: planned peaks beside measured ones.

    python -m tools.prove_grid --dir D             both halves: tables of errors, then every point
    python -m tools.prove_grid --dir D --half cpu  one of them

Why: a formula that holds for the recipes at hand may be wrong for the next one. How: two halves. `simulated`: models of
the catalogue at their real widths, as `plan --simulate` runs them, with a budget that is never met. `cpu`: small ones
with real numbers, as `profile` follows them (checkpoints are made in D and kept). Depth is cut to some blocks where it
adds nothing but time. Each switch runs through its values in an order of its own, so that every value meets many of the
others', and every architecture is there. Two points of each half train more than linears (`BESIDE`).
The tests check what the grid covers. Imported by: tests.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora_kit import files
from qlora_kit.console import progress
from qlora_kit.planning.planner import Plan, make_plan
from qlora_kit.profiling.profiler import follow_step
from qlora_kit.profiling.simulate import examples, simulate
from qlora_kit.recipe import Recipe, recipe_for_model
from qlora_kit.training.loop import train_step
from qlora_kit.training.run import assemble, place_base
from qlora_kit.training.signals import StopRequest
from qlora_kit.units import format_bytes
from tools.harness import command
from tools.random_base import random_base, shape_config

Values = dict[str, Any]
SWITCHES: dict[str, tuple[Any, ...]] = {
    "data.packing": (True, False),
    "train.micro_batch": (1, 2, 4),
    "train.grad_accumulation": (1, 2),
    "train.master_weights": (True, False),
    "adapter.rank": (8, 16, 64),
    "adapter.dtype": ("bfloat16", "bfloat16", "float32"),
    "adapter.target_modules": ("all-linear", "all-linear", "attention"),
    "memory.gradient_checkpointing": (True, True, False, 1),
    "memory.activation_offload": (False, "host"),
    "memory.keep_dequantized": (False, True),
    "memory.mlp_tile_tokens": ("auto", "full"),
    "memory.loss_chunk_tokens": ("auto", 256, "full"),
    "memory.micro_batches_together": (1, "auto"),
}
HALVES: dict[str, dict[str, tuple[Any, ...]]] = {
    "simulated": SWITCHES
    | {
        "data.seq_len": (512, 1024, 2048, 4096),
        "train.optimizer": ("paged_adamw_8bit", "adamw_8bit", "adamw", "paged_adamw_32bit"),
        "model.double_quant": (True, True, False),
        "model.quantization": ("nf4", "nf4", "nf4", "none"),
        "memory.placement": ("device", "host", "disk"),
        "memory.embeddings": ("device", "host", "disk"),
    },
    "cpu": SWITCHES
    | {  # a CPU pages nothing, and `random_base` writes double quantization only
        "data.seq_len": (128, 256, 384),
        "train.optimizer": ("adamw_8bit", "adamw", "adamw_32bit"),
        "model.quantization": ("nf4", "nf4", "nf4", "none"),
        "memory.placement": ("device", "disk"),
        "memory.embeddings": ("device", "disk"),
    },
}
# Of each half: models, their blocks (None: all) and how often the list is gone through.
MODELS: dict[str, tuple[tuple[tuple[str, int | None], ...], int]] = {
    "simulated": (
        (
            ("llama-3.1-8b", 4),
            ("mistral-7b-v0.1", 4),
            ("qwen2.5-7b", 4),
            ("qwen3-8b", 4),
            ("gemma-2-9b", 4),
            ("gemma-3-1b", 8),
            ("phi-3-mini", 4),
            ("gpt2-xl", 6),
            ("pythia-6.9b", 4),
            ("olmo-2-7b", 4),
            ("llama-3.1-70b", 3),
            ("smollm2-135m", None),
        ),
        4,
    ),
    "cpu": (
        (
            ("llama-3.2-1b", 2),
            ("mistral-7b-v0.1", 2),
            ("qwen2.5-0.5b", 3),
            ("qwen3-0.6b", 3),
            ("gemma-2-2b", 2),
            ("gemma-3-270m", 6),
            ("phi-3-mini", 2),
            ("gpt2", 4),
            ("pythia-410m", 4),
            ("olmo-2-1b", 2),
            ("smollm2-360m", 3),
            ("gpt2-xl", 3),
        ),
        2,
    ),
}


# Of each half: models with what they train beside the linears of the blocks, on the first point's switches.
BESIDE: dict[str, tuple[tuple[str, int | None, Values], ...]] = {
    half: (
        (whole, layers, {"adapter.modules_to_save": "[embed_tokens, lm_head, norm]"}),
        (branches, layers, {"adapter.target_modules": "[q_proj, v_proj, embed_tokens, lm_head]"}),
    )
    for half, whole, branches, layers in (
        ("simulated", "llama-3.1-8b", "qwen2.5-7b", 4),
        ("cpu", "smollm2-360m", "smollm2-360m", 3),
    )
}


@dataclass(frozen=True)
class Point:
    """One model with one set of switches, and what was found.

    Attributes:
        layers: blocks, or None: all.
        values: dotted key of the recipe -> value.
        planned, measured: bytes by component at the peak of a step, without the runtime.
    """

    half: str
    model: str
    layers: int | None
    values: Values
    planned: dict[str, int] | None = None
    measured: dict[str, int] | None = None

    @property
    def error(self) -> float:
        """Of the planned peak; negative: under."""
        assert self.planned is not None and self.measured is not None
        return sum(self.planned.values()) / sum(self.measured.values()) - 1


def grid(half: str) -> list[Point]:
    """The points of a half, always the same ones."""
    models, rounds = MODELS[half]
    count = len(models) * rounds
    columns = {key: _column(key, values, count) for key, values in HALVES[half].items()}
    return [
        Point(half, *models[number % len(models)], {key: column[number] for key, column in columns.items()})
        for number in range(count)
    ]


def beside(half: str) -> list[Point]:
    """Those that train more than linears of the blocks."""
    settled = {"adapter.dtype": "bfloat16", "memory.embeddings": "device"}
    values = grid(half)[0].values | settled
    return [Point(half, model, layers, values | trained) for model, layers, trained in BESIDE[half]]


def _column(key: str, values: Sequence[Any], count: int) -> list[Any]:
    """Each value as often as the others, in an order of the key's own."""
    column = [values[number % len(values)] for number in range(count)]
    random.Random(key).shuffle(column)
    return column


def recipe_of(point: Point, model: str, output: Path) -> Recipe:
    """A recipe without data; whatever the values contradict is settled as a user would."""
    values = dict(point.values)
    if values["adapter.target_modules"] == "attention":
        values["adapter.target_modules"] = r"'.*(attn|attention)\..*'"
    if values["memory.placement"] != "device":
        values["memory.resident_blocks"] = 1
    settings = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
    device = "cpu" if point.half == "cpu" else "auto"
    return recipe_for_model(model, [*settings, f"train.device={device}", f"output={output}", "memory.budget=1000GiB"])


def measure_simulated(point: Point, folder: Path) -> Point:
    """Shapes only, on the simulated device."""
    config, name = shape_config(point.model, point.layers)
    model = folder / name
    model.mkdir(exist_ok=True)
    files.write_json(model / "config.json", config | {"dtype": "bfloat16"})
    recipe = recipe_of(point, str(model), folder / "run")
    plan = make_plan(recipe)
    return _found(point, plan, simulate(plan, recipe).components)


def measure_cpu(point: Point, folder: Path) -> Point:
    """With real numbers, on this machine's CPU; checkpoints are made in `folder`."""
    dense = point.values["model.quantization"] == "none"
    model = random_base(point.model, folder, layers=point.layers, dense=dense)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        recipe = recipe_of(point, str(model), Path(output) / "run")
        plan = make_plan(recipe)
        placed = plan.placed(recipe)
        run = assemble(placed, place_base(placed, torch.device("cpu")), examples(placed), [], StopRequest())
        run.total_steps = 3
        train_step(run)  # makes the state of torch's optimizers
        return _found(point, plan, follow_step(run).peak)


def _found(point: Point, plan: Plan, measured: dict[str, int]) -> Point:
    planned = dict(plan.components) | {"runtime": 0}
    return replace(point, planned=planned, measured=measured | {"runtime": 0})


MEASURES = {"simulated": measure_simulated, "cpu": measure_cpu}


def measured_points(halves: Sequence[str], folder: Path) -> Iterator[Point]:
    """Every point of the halves, one after the other."""
    points = [point for half in halves for point in (*grid(half), *beside(half))]
    with progress("steps", len(points)) as advance, tempfile.TemporaryDirectory() as scratch:
        for point in points:
            yield MEASURES[point.half](point, folder if point.half == "cpu" else Path(scratch))
            advance(1, point.model)


# --------------------------------------------------------------------------------------------------------- tables


def summary(points: Sequence[Point]) -> Iterator[str]:
    """Lines of a table: the errors of each half."""
    yield "| half | points | median error | worst | lowest (under) | over 1 % | over 3 % |"
    yield "|---|---|---|---|---|---|---|"
    for half in dict.fromkeys(point.half for point in points):
        errors = [point.error for point in points if point.half == half]
        sizes = sorted(map(abs, errors))
        counts = (sum(size > limit for size in sizes) for limit in (0.01, 0.03))
        figures = (statistics.median(sizes), sizes[-1], min(errors))
        shares = " | ".join(f"{100 * figure:.2f} %" for figure in figures)
        yield f"| {half} | {len(errors)} | {shares} | {' | '.join(map(str, counts))} |"


def rows(points: Sequence[Point]) -> Iterator[str]:
    """Lines of a table: every point, the worst first, with the component that is furthest off."""
    yield "| model | planned | measured | error | furthest off | switches |"
    yield "|---|---|---|---|---|---|"
    for point in sorted(points, key=lambda point: -abs(point.error)):
        assert point.planned is not None and point.measured is not None
        planned, measured = point.planned, point.measured
        name = max(measured, key=lambda name: abs(planned.get(name, 0) - measured[name]))
        off = planned.get(name, 0) - measured[name]
        sizes = " | ".join(format_bytes(sum(ledger.values())) for ledger in (planned, measured))
        said = ", ".join(f"{key.partition('.')[2]}={value}" for key, value in point.values.items())
        blocks = "" if point.layers is None else f", {point.layers} blocks"
        furthest = f"{name} {'-' if off < 0 else '+'}{format_bytes(abs(off))}"
        yield f"| {point.model}{blocks} | {sizes} | {100 * point.error:+.2f} % | {furthest} | {said} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where the small models are made and kept")
    parser.add_argument("--half", choices=HALVES, action="append", help="only this one")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args()
    points = list(measured_points(options.half or list(HALVES), options.dir))
    if options.json:
        print(json.dumps({"points": [asdict(point) | {"error": point.error} for point in points]}, indent=2))
        return 0
    print("\n".join([*summary(points), "", *rows(points)]))
    return 0


if __name__ == "__main__":
    command(main)
