"""A training step against its floor: the time of its matrix products and dequantizations on this machine, in this run.

    python -m tools.bench_roofline --dir D                                    Llama-3.2-1B, 1024 tokens: docs' figure
    python -m tools.bench_roofline --dir D --shape llama-2-7b --layers 8 --seq-len 512

Prints floor / measured for blocks on the device, streamed from host memory, and streamed from disk with a warm cache,
their steps in turn, and where the floor lies. The floor is timed before and after the steps; the best of both counts,
and the best step: a measure of this code, not of what else the machine does. The floor itself: `tools/floor.py`.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import torch

from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config
from qlora_kit.recipe import Recipe
from qlora_kit.units import format_seconds
from tools.cgroups import fill_cache
from tools.floor import Floor, floor_seconds
from tools.harness import (
    PLACEMENTS,
    add_common,
    alternate,
    carry_out,
    command,
    kit_worker,
    median,
    table,
    write_recipe,
)
from tools.random_base import random_base


def better(one: Floor, other: Floor) -> Floor:
    """The floor that is lower; both are of the same work."""
    return one if one.seconds < other.seconds else other


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Steps of every placement in turn, between two measurements of the floor."""
    model = random_base(options.shape, options.dir, layers=options.layers)
    fill_cache(model)
    shapes: ModelShapes = model_shapes(*read_config(str(model)))
    recipes: dict[str, tuple[Path, Recipe]] = {}
    for name in options.placements:
        (folder / name).mkdir()
        values = PLACEMENTS[name] | {"data.seq_len": options.seq_len, "adapter.rank": options.rank}
        recipes[name] = write_recipe(folder / name, model, values, options.set)[:2]
    recipe = next(iter(recipes.values()))[1]
    if options.threads:
        torch.set_num_threads(options.threads)
    floor = floor_seconds(shapes, recipe)
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(kit_worker(path, steps=options.steps + 1, threads=options.threads))
            for name, (path, _) in recipes.items()
        }
        answers = alternate(workers, options.steps)
    floor = better(floor, floor_seconds(shapes, recipe))
    found = {}
    for name, of_one in answers.items():
        fastest = min(answer["seconds"] for answer in of_one)
        found[name] = {
            "step_s": fastest,
            "median_step_s": median(of_one),
            "floor_over_step": floor.seconds / fastest,
            "tokens_per_s": of_one[0]["tokens"] / fastest,
            "loss": of_one[-1]["loss"],
        }
    return {"shape": model.name, "seq_len": options.seq_len, "floor": floor.to_json(), "placements": found}


def show(found: dict[str, Any]) -> None:
    floor = found["floor"]
    print(f"{found['shape']}, {found['seq_len']} tokens a step; floor {format_seconds(floor['seconds'])}")
    rows: list[list[object]] = [["blocks on", "best step, s", "median, s", "tokens/s", "floor / step"]]
    for name, figures in found["placements"].items():
        rows.append([name, *(figures[key] for key in ("step_s", "median_step_s", "tokens_per_s", "floor_over_step"))])
    print(table(rows))
    parts: list[list[object]] = [["part of the floor", "seconds", "share"]]
    parts += [[name, value, value / floor["seconds"]] for name, value in floor["parts"].items()]
    print(table(parts))
    print(
        f"products {floor['operations'] / 1e12:.2f} TFLOP at {floor['product_operations_s'] / 1e9:.0f} GFLOP/s, "
        f"{floor['dequantized'] / 1e9:.2f} G weights dequantized at {floor['dequantized_weights_s'] / 1e9:.2f} G/s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser)
    parser.add_argument("--shape", default="llama-3.2-1b", help="a model of the catalogue (default llama-3.2-1b)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a step (default 1024)")
    parser.add_argument("--steps", type=int, default=3, help="measured, after one that warms up (default 3)")
    parser.add_argument("--placements", nargs="+", choices=list(PLACEMENTS), default=list(PLACEMENTS))
    options = parser.parse_args()
    return carry_out(options, measure, show)


if __name__ == "__main__":
    command(main)
