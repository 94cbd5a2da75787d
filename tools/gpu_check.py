"""What this kit does on your GPU, in one command: the proofs, the rates, and what streaming costs there.

    python -m tools.gpu_check --dir D [--out gpu_check.json]         about ten minutes, 4 GB of disk

Nobody who wrote this kit had a GPU at hand: all that CUDA alone can run is listed as unproved in docs/benchmarks.md
until this command has run on one. Without an accelerator it makes no claim: it ends with exit code 4.
Prints and writes: the machine; every proof of `qlora-kit selftest` on it; a step's floor (products and dequantizations
at the rates of this device) against steps with blocks on the device, in host memory and on disk; the planned peak of
each against the allocator's. The optimizer is the paged one.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from qlora_kit import files, selftest
from qlora_kit.base.device import free_bytes, has_unified_memory, pick_device
from qlora_kit.doctor import examine
from qlora_kit.errors import ModelError
from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.units import format_bytes, format_seconds
from tools.floor import floor_seconds
from tools.harness import PLACEMENTS, add_common, command, kit_worker, median, scratch, table, write_recipe
from tools.random_base import random_base


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    return {
        "device": str(device),
        "accelerator": examine()["accelerator"],
        "free_bytes": free_bytes(device),
        "unified_memory": has_unified_memory(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def steps(options: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Any]:
    """Steps of the real training code with blocks in each place, one process after the other, beside plan and floor."""
    model = random_base(options.shape, options.dir, layers=options.layers)
    found: dict[str, Any] = {}
    for name, placement in PLACEMENTS.items():
        (folder / name).mkdir()
        values = placement | {"data.seq_len": options.seq_len, "adapter.rank": options.rank}
        values["train.optimizer"] = "paged_adamw_8bit"
        path, recipe, plan = write_recipe(folder / name, model, values, options.set)
        with kit_worker(path, steps=options.steps + 1, threads=options.threads) as worker:
            answers = [worker.ask() for _ in range(options.steps + 1)]
        found[name] = {
            "step_s": median(answers[1:]),
            "losses": [answer["loss"] for answer in answers],
            "peak_bytes": max(answer["device_peak_bytes"] for answer in answers),
            "planned_bytes": plan.peak_bytes - plan.components["runtime"],
            "components": plan.components,
        }
    floor = floor_seconds(model_shapes(*read_config(str(model))), recipe, device)
    return {"shape": model.name, "seq_len": options.seq_len, "floor": floor.to_json(), "placements": found}


def show(found: dict[str, Any]) -> None:
    floor, device = found["steps"]["floor"], found["steps"]["placements"]["device"]
    rows: list[list[object]] = [["blocks on", "step, s", "x device", "floor / step", "peak", "planned", "same losses"]]
    for name, one in found["steps"]["placements"].items():
        ratio, share = one["step_s"] / device["step_s"], floor["seconds"] / one["step_s"]
        sizes = [format_bytes(one[key]) for key in ("peak_bytes", "planned_bytes")]
        rows.append([name, one["step_s"], ratio, share, *sizes, one["losses"] == device["losses"]])
    print(f"{found['steps']['shape']}, {found['steps']['seq_len']} tokens; floor {format_seconds(floor['seconds'])}")
    print(table(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--shape", default="llama-2-7b", help="a model of the catalogue (default llama-2-7b)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a step (default 2048)")
    parser.add_argument("--steps", type=int, default=5, help="measured, after one that warms up (default 5)")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="where the results go")
    options = parser.parse_args()
    device = pick_device()
    if device.type == "cpu":
        raise ModelError(
            "no accelerator here, so there is nothing to check; `qlora-kit selftest` proves what a CPU can"
        )
    print(f"{device}: {format_bytes(free_bytes(device))} free")
    proofs = selftest.report(selftest.run(device), device)
    with scratch(options.dir) as folder:
        found = {"machine": machine(device), "proofs": [vars(proof) for proof in proofs]}
        found["steps"] = steps(options, folder, device)
    files.write_json(options.out, found)
    print(json.dumps(found)) if options.json else show(found)
    print(f"written: {options.out}")
    return 0 if all(proof.passed for proof in proofs) else 1


if __name__ == "__main__":
    command(main)
