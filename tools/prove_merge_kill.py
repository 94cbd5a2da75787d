"""kill -9 at random instants of a merge: the folder is whole or not there, and the rerun gives the same bytes.

    python -m tools.prove_merge_kill --dir D                      50 kills, a random model of several shards
    python -m tools.prove_merge_kill --dir D --kills 500

How: one merge runs to its end and is kept as the reference. Then a fresh process merges into a new folder and is killed
after a random part of the time that the reference took, counted from when it is ready; if the folder is there, each of
its files must have its hash in the report. The same is done again in the same place, until a process ends by itself;
its folder must be the reference's, byte for byte. Imported by: tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from qlora_kit import files
from qlora_kit.adapters.store import CONFIG, WEIGHTS
from qlora_kit.base.shards import save_tensors
from qlora_kit.export.output import REPORT
from qlora_kit.planning.shapes import ModelShapes, model_shapes
from tools.harness import add_common, carry_out, command, table

LAYERS, HIDDEN, RANK = 12, 512, 8
MODEL: dict[str, Any] = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN}
MODEL |= {"num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1024}
WORKER = """
import os
import sys
from pathlib import Path
from qlora_kit.export.merge import merge_model
print("ready", flush=True)
merge_model(*map(Path, sys.argv[1:]))
os._exit(0)  # so that the time measured, and cut at random, is the merge's and not that of the interpreter's end
"""


def make_inputs(folder: Path, layers: int) -> tuple[Path, Path]:
    """A random base of one shard a layer, and an adapter on all its linears."""
    config = MODEL | {"num_hidden_layers": layers}
    shapes = model_shapes(config, "kill")
    base, adapter = folder / "base", folder / "adapter"
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.tensors:
        layer = name.split(".")[2] if ".layers." in name else "outer"
        file_name = f"model-{layer}.safetensors"
        value = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        groups.setdefault(file_name, {})[name] = value
        index[name] = file_name
    for file_name, tensors in groups.items():
        save_tensors(base / file_name, tensors, {"format": "pt"})
    files.write_json(base / "model.safetensors.index.json", {"weight_map": index})
    files.write_json(base / "config.json", config | {"dtype": "bfloat16"})
    write_adapter(adapter, shapes, RANK, generator)
    return base, adapter


def write_adapter(folder: Path, shapes: ModelShapes, rank: int, generator: torch.Generator) -> Path:
    """A random adapter on all linears of the blocks, as PEFT writes one."""
    tensors = {}
    for layer in range(shapes.layers):
        for linear in shapes.linears:
            name = f"base_model.model.{shapes.architecture.blocks}.{layer}.{linear.name}"
            for leaf, shape in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
                value = torch.randn(shape, generator=generator).mul_(0.01).bfloat16()
                tensors[f"{name}.lora_{leaf}.weight"] = value
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    leaves = sorted({linear.name.rpartition(".")[2] for linear in shapes.linears})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": leaves}
    files.write_json(folder / CONFIG, config | {"task_type": "CAUSAL_LM", "base_model_name_or_path": None})
    return folder


def start(base: Path, adapter: Path, out: Path) -> subprocess.Popen[str]:
    """A process that merges; returned when its imports are done."""
    arguments = [sys.executable, "-c", WORKER, str(base), str(adapter), str(out)]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ},
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


def contents(folder: Path) -> dict[str, str]:
    return {path.name: files.sha256(path) for path in folder.iterdir()}


def whole(out: Path) -> bool:
    """Whether a folder is all that its report says, and nothing else."""
    with contextlib.suppress(OSError, ValueError):
        found, report = contents(out), json.loads((out / REPORT).read_text())
        del found[REPORT]
        return bool(found == report["sha256"])
    return False


def prove(folder: Path, kills: int, layers: int = LAYERS, seed: int = 0) -> dict[str, Any]:
    """Counts of what the kills left, and whether every rerun gave the reference."""
    chance = random.Random(seed)
    base, adapter = make_inputs(folder, layers)
    process = start(base, adapter, folder / "reference")
    started = time.monotonic()
    process.wait()
    seconds = time.monotonic() - started
    reference, out = contents(folder / "reference"), folder / "out"
    found = {"kills": 0, "left_nothing": 0, "left_the_whole": 0, "left_a_broken_folder": 0, "completed": 0, "other": 0}
    while found["kills"] < kills:
        process = start(base, adapter, out)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.random() * seconds)
        killed = process.poll() is None
        process.kill()
        process.wait()
        found["kills"] += killed
        if not out.exists():
            found["left_nothing"] += 1
            continue
        found["left_the_whole" if whole(out) else "left_a_broken_folder"] += 1
        found["completed"] += start(base, adapter, out).wait() == 0  # also clears what a kill after the rename left
        found["other"] += contents(out) != reference
        shutil.rmtree(out)
    start(base, adapter, out).wait()
    found["completed"] += 1
    found["other"] += contents(out) != reference
    left = sorted(path.name for path in folder.iterdir() if path.name not in ("base", "adapter", "reference", "out"))
    return {**found, "left_beside": left, "merge_seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser)
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()

    def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
        return prove(folder, options.kills, options.layers or LAYERS)

    def show(found: dict[str, Any]) -> None:
        print(table([("what", "count"), *((key, str(value)) for key, value in found.items())]))

    return carry_out(options, measure, show)


if __name__ == "__main__":
    command(main)
