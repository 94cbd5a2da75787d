"""Does a shape train in so much memory? Steps of the real training code, inside a limit that the kernel holds.

    python -m tools.prove_fit --shape llama-2-7b --seq-len 512 --steps 1 --dir D --limit 2GiB
    python -m tools.prove_fit --shape llama-3-70b --seq-len 256 --steps 1 --dir D --limit 5GiB      36 GB of disk

Makes the NF4 checkpoint with random codes once (tools/random_base.py), then loads it with placement disk and steps, in
a process of its own. With --limit that process lives in a memory control group (root, version 1): it gets no byte more,
its page cache counted too, and the checkpoint's pages are dropped before it starts. Prints the peak, by component
beside the plan, seconds a step, and the floor (tools/floor.py). Exit code 0: it ran; 6: the limit killed it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
from pathlib import Path
from typing import Any

from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.recipe import Recipe
from qlora_kit.units import format_bytes, format_seconds, parse_bytes
from tools.cgroups import MemoryGroup, drop_cache
from tools.harness import (
    PLACEMENTS,
    Answer,
    Worker,
    WorkerDied,
    add_common,
    command,
    kit_worker,
    process_memory,
    scratch,
    table,
    write_recipe,
)

SAMPLE_SECONDS = 0.05
DOES_NOT_FIT = 6
LIBRARIES_BYTES = 400 << 20  # about; a plan's budget counts neither them nor the interpreter
MOVING = ("activations", "logits")
DEFAULTS = PLACEMENTS["disk"] | {"memory.embeddings": "disk"}


class Peak(threading.Thread):
    """Watches a process for the most anonymous memory, which the kernel keeps no record of."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.anonymous_bytes, self._ended = pid, 0, threading.Event()

    def run(self) -> None:
        with contextlib.suppress(OSError, KeyError):  # the process ended
            while not self._ended.wait(SAMPLE_SECONDS):
                self.anonymous_bytes = max(self.anonymous_bytes, process_memory(self.pid)["anonymous_bytes"])

    def end(self) -> int:
        self._ended.set()
        self.join()
        return self.anonymous_bytes


def run_steps(worker: Worker, steps: int) -> Answer:
    """Load, step, count; says how far it came when it is killed."""
    found: Answer = {"steps": [], "died": None}
    peak = Peak(worker.pid)
    peak.start()
    try:
        found["loaded"] = worker.loaded
        for _ in range(steps):
            found["steps"].append(worker.ask())
        found |= worker.ask("components")
    except WorkerDied as death:
        found["died"] = {"code": death.code, "message": str(death)}
    found["peak_anonymous_bytes"] = peak.end()
    return found


def prove(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that is printed."""
    from tools.random_base import random_base

    model = random_base(options.shape, options.dir, layers=options.layers)
    values = DEFAULTS | {"data.seq_len": options.seq_len, "adapter.rank": options.rank}
    if options.limit:
        values["memory.budget"] = max(1, options.limit - LIBRARIES_BYTES)
    path, recipe, plan = write_recipe(folder, model, values, options.set)
    found: dict[str, Any] = {"shape": model.name, "seq_len": recipe.data.seq_len, "planned": dict(plan.components)}
    found["recipe"] = recipe.model_dump(mode="json")
    drop_cache(model)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(MemoryGroup(options.limit)) if options.limit else None
        worker = stack.enter_context(
            kit_worker(path, steps=options.steps, threads=options.threads, groups=[group] if group else [])
        )
        found |= run_steps(worker, options.steps)
        found["group"] = group.figures() if isinstance(group, MemoryGroup) else None
    if found["died"] is None and not options.no_floor:
        found["floor"] = floor(model, recipe, options.threads)
    return found | {"killed_by_limit": was_killed(found), "measured": measured(found)}


def was_killed(found: dict[str, Any]) -> bool:
    """Whether the process ended because the limit was reached."""
    return found["died"] is not None and found["group"] is not None and found["group"]["killed"] > 0


def floor(model: Path, recipe: Recipe, threads: int | None) -> dict[str, Any]:
    """The floor of a step on this machine, now."""
    import torch

    from tools.floor import floor_seconds

    if threads:
        torch.set_num_threads(threads)
    return floor_seconds(model_shapes(*read_config(str(model))), recipe, recipe_device(recipe)).to_json()


def recipe_device(recipe: Recipe) -> str:
    """The device that the recipe ran on."""
    from qlora_kit.base.device import pick_device

    return pick_device(recipe.train.device).type


def measured(found: dict[str, Any]) -> dict[str, int]:
    """Bytes by the ledger's names: of tensors that could be counted, and what is left of the peak.

    `runtime`: interpreter and libraries; `rest`: activations and logits, of which only the sum shows.
    """
    if "components" not in found:
        return {}
    counted: dict[str, int] = dict(found["components"])
    runtime = found["loaded"]["libraries_bytes"]
    step_peak = max(answer["peak_bytes"] for answer in found["steps"])
    return counted | {"rest": step_peak - runtime - sum(counted.values()), "runtime": runtime}


# ---------------------------------------------------------------------------------------------------------- showing


def show(found: dict[str, Any]) -> None:
    print(f"{found['shape']}, {found['seq_len']} tokens")
    if found["group"]:
        print(limit_line(found))
    if found["died"] is not None:
        if not found["killed_by_limit"]:
            print(found["died"]["message"])
        return
    show_components(found)
    peak = max(answer["peak_bytes"] for answer in [found["loaded"], *found["steps"]])
    print(
        f"peak of the process: {format_bytes(peak)} resident, libraries included; "
        f"{format_bytes(found['peak_anonymous_bytes'])} of it at most its own memory (the rest: mapped files)"
    )
    for number, step in enumerate(found["steps"], 1):
        rate = step["tokens"] / step["seconds"]
        print(f"step {number}: {format_seconds(step['seconds'])}, {rate:.1f} tokens/s, loss {step['loss']:.4f}")
    if "floor" in found:
        seconds, best = found["floor"]["seconds"], min(step["seconds"] for step in found["steps"])
        print(
            f"floor, products and dequantizations alone: {format_seconds(seconds)}; floor / step {seconds / best:.2f}"
        )


def limit_line(found: dict[str, Any]) -> str:
    """What the kernel says."""
    group, limit = found["group"], format_bytes(found["group"]["limit_bytes"])
    if found["killed_by_limit"]:
        where = f"in step {len(found['steps']) + 1}" if "loaded" in found else "while loading"
        return f"limit {limit}: KILLED {where}; it does not fit"
    most = group["max_usage_bytes"]
    reached = ", so that the kernel dropped cache" if most >= group["limit_bytes"] else ""
    return f"limit {limit}: held, page cache included; at most {format_bytes(most)} in use{reached}"


def show_components(found: dict[str, Any]) -> None:
    """Planned beside measured; where tensors cannot be told apart, their sum."""
    planned, counted = found["planned"], found["measured"]
    rows: list[list[object]] = [["component", "planned", "measured"]]
    for name, count in planned.items():
        rows.append([name, format_bytes(count), "in the rest" if name in MOVING else format_bytes(counted[name])])
    rest = sum(planned[name] for name in MOVING)
    rows.append([f"the rest: {', '.join(MOVING)}", format_bytes(rest), format_bytes(counted["rest"])])
    rows.append(["all", format_bytes(sum(planned.values())), format_bytes(sum(counted.values()))])
    print(table(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser)
    parser.add_argument("--shape", required=True, help="a model of the catalogue, a folder or a config.json")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a step (default 512)")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--limit", type=parse_bytes, help="memory of the process, such as 3GiB; needs root")
    parser.add_argument("--no-floor", action="store_true", help="do not time the floor")
    options = parser.parse_args()
    with scratch(options.dir) as folder:
        found = prove(options, folder)
    print(json.dumps(found, indent=2)) if options.json else show(found)
    return DOES_NOT_FIT if found["killed_by_limit"] else 1 if found["died"] is not None else 0


if __name__ == "__main__":
    command(main)
