"""This kit against peft + transformers + bitsandbytes, and trl's SFTTrainer: one model, the same batches, in turn.

    python -m tools.bench_peers --dir D                    Llama-3.2-1B shape, 1024 tokens, rank 16: docs' table, 4.9 GB
    python -m tools.bench_peers --dir D --budget-of-peer   and this kit with as much memory as peft took

Each contender is a process (tools/kit_worker.py, tools/peers.py) with as many threads as the others and your shell's
environment; one computes at a time, a step each in turn, so that other load hits all alike. This kit runs twice: its
base on the device as the others have it, and streamed from an NF4 checkpoint on disk, embedding and head too. Prints
tokens/s, the peak resident memory of each process, the loss of every step side by side, and seconds and peak of
loading: from the bf16 model, and from its NF4 checkpoint. Libraries are imported before that clock starts; files are
in the page cache. trl is not a dependency of this project: `pip install trl` (docs' figures: 1.16.0), or --without trl.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_kit.units import format_bytes
from tools.cgroups import fill_cache
from tools.harness import (
    PLACEMENTS,
    Answer,
    Worker,
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

KIT, PEFT, TRL = "kit", "peft", "trl"
KIT_STREAMED, KIT_BUDGET = "kit, base on disk", "kit, peft's memory"
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "trl")
RECOMPUTED = {"memory.placement": "device", "memory.gradient_checkpointing": True}  # as the others do
STREAMED = RECOMPUTED | PLACEMENTS["disk"] | {"memory.embeddings": "disk", "memory.keep_dequantized": False}
Start = Callable[[str, Path, dict[str, Any]], Worker]


def starter(options: argparse.Namespace, folder: Path, steps: int) -> Start:
    """(contender, model, recipe values) -> its worker, loading."""

    def start(name: str, model: Path, values: dict[str, Any]) -> Worker:
        place = Path(tempfile.mkdtemp(dir=folder))
        values = values | {"data.seq_len": options.seq_len, "adapter.rank": options.rank}
        path, _, _ = write_recipe(place, model, values, options.set)
        if name not in (PEFT, TRL):
            return kit_worker(path, steps=steps, threads=options.threads)
        return Worker(["-m", "tools.peers", name, str(path), "--steps", str(steps)], threads=options.threads)

    return start


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Load one after the other, then step in turn."""
    from qlora_kit.base.quantize_model import quantize_model

    dense = random_base(options.shape, options.dir, layers=options.layers, dense=True)
    nf4 = dense.with_name(f"{dense.name}-nf4")
    if not nf4.exists():
        quantize_model(dense, nf4)
    for model in (dense, nf4):
        fill_cache(model)
    start = starter(options, folder, options.warm_up + options.steps)
    names = [name for name in (KIT, PEFT, TRL) if name not in options.without]
    with contextlib.ExitStack() as stack:
        workers = loaded_in_turn(stack, start, dense, dict.fromkeys(names, RECOMPUTED))
        workers |= loaded_in_turn(stack, start, nf4, {KIT_STREAMED: STREAMED})
        answers = alternate(workers, options.steps + options.warm_up, warm_up=0)
        found = {name: figures(worker.loaded, answers[name], options.warm_up) for name, worker in workers.items()}
    if options.budget_of_peer:
        found |= with_memory_of_peer(options, start, dense, found)
    loads = {name: load_only(start, name, nf4) for name in names if name != TRL}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name not in options.without}
    setting = {"shape": dense.name, "seq_len": options.seq_len, "rank": options.rank, "versions": versions}
    return setting | {"contenders": found, "from_nf4": loads}


def loaded_in_turn(
    stack: contextlib.ExitStack, start: Start, model: Path, values: dict[str, dict[str, Any]]
) -> dict[str, Worker]:
    """Workers that are ready, by name; one loads at a time."""
    workers: dict[str, Worker] = {}
    for name, of_one in values.items():
        workers[name] = stack.enter_context(start(name, model, of_one))
        _ = workers[name].loaded
    return workers


def with_memory_of_peer(
    options: argparse.Namespace, start: Start, dense: Path, found: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The kit once more, its whole process allowed peft's peak, in turn with peft: it may keep activations of blocks.

    The budget is what is left of that peak beside the kit's libraries, which a plan does not count.
    """
    budget = found[PEFT]["peak_bytes"] - found[KIT]["libraries_bytes"]
    values = RECOMPUTED | {"memory.budget": budget, "memory.gradient_checkpointing": "auto"}
    with contextlib.ExitStack() as stack:
        workers = loaded_in_turn(stack, start, dense, {KIT_BUDGET: values, PEFT: {}})
        answers = alternate(workers, options.steps + options.warm_up, warm_up=0)
        again = {name: figures(worker.loaded, answers[name], options.warm_up) for name, worker in workers.items()}
    again[KIT_BUDGET] |= {"budget_bytes": budget, "peft_tokens_per_s": again[PEFT]["tokens_per_s"]}
    return {KIT_BUDGET: again[KIT_BUDGET]}


def load_only(start: Start, name: str, model: Path) -> dict[str, Any]:
    """Seconds and peak of loading a model, nothing more."""
    with start(name, model, {}) as worker:
        return {"load_s": worker.loaded["load_s"], "load_peak_bytes": worker.loaded["peak_bytes"]}


def figures(loaded: Answer, answers: list[Answer], warm_up: int) -> dict[str, Any]:
    """What is told of a contender."""
    measured = answers[warm_up:]
    return {
        "import_s": loaded["import_s"],
        "load_s": loaded["load_s"],
        "load_peak_bytes": loaded["peak_bytes"],
        "libraries_bytes": loaded["libraries_bytes"],
        "first_step_s": answers[0]["seconds"],
        "step_s": median(measured),
        "tokens_per_s": median(measured, "tokens") / median(measured),
        "peak_bytes": max(loaded["peak_bytes"], *(answer["peak_bytes"] for answer in answers)),
        "losses": [answer["loss"] for answer in answers],
    }


def show(found: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    print(f"{found['shape']}, rank {found['rank']} on all linears, {found['seq_len']} tokens a step; {versions}")
    contenders, peft = found["contenders"], found["contenders"].get(PEFT)
    rows: list[list[object]] = [
        ["", "step, s", "tokens/s", "x peft", "peak", "x peft", "load, s", "x peft", "load peak"]
    ]
    for name, of_one in contenders.items():
        base = of_one.get("peft_tokens_per_s") or (peft and peft["tokens_per_s"])
        row: list[object] = [name, of_one["step_s"], of_one["tokens_per_s"], ratio(of_one["tokens_per_s"], base)]
        row += [format_bytes(of_one["peak_bytes"]), ratio(of_one["peak_bytes"], peft and peft["peak_bytes"])]
        row += [of_one["load_s"], ratio(of_one["load_s"], peft and peft["load_s"])]
        rows.append([*row, format_bytes(of_one["load_peak_bytes"])])
    print(table(rows))
    loads: list[list[object]] = [["from the NF4 checkpoint", "load, s", "x peft", "x peft from bf16", "load peak"]]
    for name, of_one in found["from_nf4"].items():
        beside = found["from_nf4"].get(PEFT)
        ratios = (ratio(of_one["load_s"], other and other["load_s"]) for other in (beside, peft))
        loads.append([name, of_one["load_s"], *ratios, format_bytes(of_one["load_peak_bytes"])])
    print(table(loads))
    losses: list[list[object]] = [["loss of step", *contenders]]
    steps = zip(*(of_one["losses"] for of_one in contenders.values()))
    losses += [[number, *(f"{loss:.4f}" for loss in values)] for number, values in enumerate(steps, 1)]
    print(table(losses))


def ratio(ours: float, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if theirs else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser)
    parser.add_argument("--shape", default="llama-3.2-1b", help="a model of the catalogue (default llama-3.2-1b)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a step (default 1024)")
    parser.add_argument("--steps", type=int, default=5, help="measured (default 5)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before (default 2)")
    parser.add_argument("--budget-of-peer", action="store_true", help="also: this kit with peft's memory")
    parser.add_argument("--without", nargs="+", choices=[PEFT, TRL], default=[], help="contenders to leave out")
    options = parser.parse_args()
    if options.budget_of_peer and PEFT in options.without:
        parser.error("--budget-of-peer needs peft")
    return carry_out(options, measure, show)


if __name__ == "__main__":
    command(main)
