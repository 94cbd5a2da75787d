"""What streaming costs and saves: step time against a resident base, block-major accumulation, and peak memory.

    python -m tools.bench_streaming times --dir D                                   Llama-3.2-1B, 1024 tokens
    python -m tools.bench_streaming times --dir D --shape llama-2-7b --layers 8 --seq-len 512
    python -m tools.bench_streaming together --dir D --shape llama-2-7b [--read-limit 200MiB]
    python -m tools.bench_streaming depth --dir D                                   16, 32 and 64 blocks
    python -m tools.bench_streaming length --dir D --layers 4                       1k, 2k, 4k and 8k tokens

times      streamed / resident step time: blocks on the device, on the host, on disk with a warm cache, in turn
together   8 micro-batches of 256 tokens, blocks on disk: all pass a block before any passes the next, against one by
           one; tokens/s, and the gradients of both compared. --cold keeps the checkpoint out of the page cache;
           --read-limit also slows the disk to so many bytes a second (root, control groups of version 1)
depth      peak memory against the number of blocks, block inputs on disk, beside the plan's components: flat, but for
           what the adapter takes (its column)
length     peak memory against the sequence length, beside the plan's: the same slope
Memory is that of a fresh process each, above its libraries, with a budget of a tenth more than its plan.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from pathlib import Path
from typing import Any

from qlora_kit.units import format_bytes, parse_bytes
from tools.cgroups import Group, ReadLimit, always_cold, fill_cache
from tools.harness import PLACEMENTS, add_common, alternate, carry_out, command, kit_worker, median, table, write_recipe
from tools.random_base import random_base

Values = dict[str, Any]
STREAMED = PLACEMENTS["disk"]
ROOM = 1.1  # of a plan's peak, as the budget whose peak is measured: little enough for freed memory to be given back
TRAINED = ("adapter", "gradients", "optimizer")  # what grows with depth though blocks are streamed


def times(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Steps of the three placements in turn; a ratio is the median over the rounds."""
    model = random_base(options.shape, options.dir, layers=options.layers)
    fill_cache(model)
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, values in PLACEMENTS.items():
            (folder / name).mkdir()
            values = values | {"data.seq_len": options.seq_len, "adapter.rank": options.rank}
            path, _, _ = write_recipe(folder / name, model, values, options.set)
            workers[name] = stack.enter_context(kit_worker(path, steps=options.steps + 1, threads=options.threads))
        answers = alternate(workers, options.steps)
    resident = answers["device"]
    rows = {}
    for name, of_one in answers.items():
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(of_one, resident)]
        losses = [answer["loss"] for answer in of_one] == [answer["loss"] for answer in resident]
        rows[name] = {"median_step_s": median(of_one), "ratio": statistics.median(ratios), "same_losses": losses}
    return {"shape": model.name, "seq_len": options.seq_len, "placements": rows}


def show_times(found: dict[str, Any]) -> None:
    print(f"{found['shape']}, {found['seq_len']} tokens a step, streamed / resident")
    rows: list[list[object]] = [["blocks on", "median step, s", "x resident", "same losses"]]
    rows += [[name, *figures.values()] for name, figures in found["placements"].items()]
    print(table(rows))


# ------------------------------------------------------------------------------------------------ block-major


def together(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All micro-batches of a step through each block together, against one after the other."""
    model = random_base(options.shape, options.dir, layers=options.layers)
    count = options.micro_batches
    with contextlib.ExitStack() as stack:
        groups: list[Group] = []
        if options.read_limit:
            groups.append(stack.enter_context(ReadLimit(model, options.read_limit)))
        cold = options.cold or bool(options.read_limit)
        stack.enter_context(always_cold(model)) if cold else fill_cache(model)
        workers = {}
        for name, value in (("together", count), ("one by one", 1)):
            (folder / name).mkdir()
            values = STREAMED | {"data.seq_len": options.seq_len, "adapter.rank": options.rank}
            values |= {"train.grad_accumulation": count, "memory.micro_batches_together": value}
            path, _, _ = write_recipe(folder / name, model, values, options.set)
            workers[name] = stack.enter_context(
                kit_worker(path, steps=1, gradients=folder / name / "g", threads=options.threads, groups=groups)
            )
        first = {name: [worker.ask()] for name, worker in workers.items()}
        gradients = compare(folder / "together" / "g", folder / "one by one" / "g")
        answers = alternate(workers, options.steps, warm_up=0)
    rates = {name: median(of_one, "tokens") / median(of_one) for name, of_one in answers.items()}
    return {
        "shape": model.name,
        "micro_batches": count,
        "read_limit": options.read_limit,
        "cold": cold,
        "tokens_per_s": rates,
        "ratio": rates["together"] / rates["one by one"],
        "loss": {name: of_one[0]["loss"] for name, of_one in first.items()},
        "gradients": gradients,
    }


def compare(one: Path, other: Path) -> dict[str, Any]:
    """How far the gradients of two orders of accumulation are apart: |a - b| / |b|, of all, and of the worst tensor."""
    import torch

    from qlora_kit.base.shards import Shards

    left, right = Shards([one]), Shards([other])
    apart, norms, equal = [], [], 0
    for name in right.entries:
        a, b = left.read(name), right.read(name)
        equal += torch.equal(a, b)
        apart.append((a.double() - b.double()).norm().item())
        norms.append(b.double().norm().item())
    overall = sum(value**2 for value in apart) ** 0.5 / sum(value**2 for value in norms) ** 0.5
    worst = max(difference / norm for difference, norm in zip(apart, norms) if norm)
    return {"tensors": len(apart), "bit_equal": equal, "relative_difference": overall, "worst_tensor": worst}


def show_together(found: dict[str, Any]) -> None:
    disk = "cold" if found["cold"] else "warm cache"
    disk += f", {format_bytes(found['read_limit'])}/s at most" if found["read_limit"] else ""
    print(f"{found['shape']}, {found['micro_batches']} micro-batches a step, blocks on disk ({disk})")
    rows: list[list[object]] = [["order", "tokens/s", "loss of step 1"]]
    rows += [[name, rate, found["loss"][name]] for name, rate in found["tokens_per_s"].items()]
    print(table(rows))
    apart = found["gradients"]
    print(f"together / one by one: {found['ratio']:.2f}")
    print(
        f"gradients: {apart['bit_equal']} of {apart['tensors']} tensors bit-equal; apart by "
        f"{apart['relative_difference']:.2e} of their norm, the worst tensor by {apart['worst_tensor']:.2e}"
    )


# ------------------------------------------------------------------------------------------------ peak memory


def depth(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peaks for several numbers of blocks."""
    values = STREAMED | {"memory.embeddings": "disk", "memory.activation_offload": "disk"}
    values["data.seq_len"] = options.seq_len
    cases = {count: (count, values) for count in options.values or (16, 32, 64)}
    return {"shape": options.shape, "by": "blocks"} | peaks(options, folder, cases)


def length(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peaks for several sequence lengths."""
    wanted = options.values or (1024, 2048, 4096, 8192)
    cases = {tokens: (options.layers, STREAMED | {"data.seq_len": tokens}) for tokens in wanted}
    return {"shape": options.shape, "by": "tokens"} | peaks(options, folder, cases)


def peaks(options: argparse.Namespace, folder: Path, cases: dict[int, tuple[int | None, Values]]) -> dict[str, Any]:
    """Planned and measured peak of each case, every one in a fresh process."""
    rows = {}
    for case, (layers, values) in cases.items():
        model = random_base(options.shape, options.dir, layers=layers)
        (folder / str(case)).mkdir()
        values = values | {"adapter.rank": options.rank}
        _, _, plan = write_recipe(folder / str(case), model, values, options.set)
        tight = values | {"memory.budget": int(ROOM * plan.peak_bytes)}
        path, _, plan = write_recipe(folder / str(case), model, tight, options.set)
        with kit_worker(path, steps=options.steps, threads=options.threads) as worker:
            libraries = worker.loaded["libraries_bytes"]
            peak = max(worker.ask()["peak_bytes"] for _ in range(options.steps))
        trained = sum(plan.components[name] for name in TRAINED)
        rows[case] = {
            "planned_bytes": sum(plan.components.values()),
            "measured_bytes": peak - libraries,
            "trained_bytes": trained,
            "libraries_bytes": libraries,
        }
    (first, low), *_, (last, high) = rows.items()
    slopes = {kind: (high[kind] - low[kind]) / max(1, last - first) for kind in ("planned_bytes", "measured_bytes")}
    return {"cases": rows, "slope": slopes}


def show_peaks(found: dict[str, Any]) -> None:
    by = found["by"]
    print(f"{found['shape']}: peak memory against {by}, libraries not counted")
    rows: list[list[object]] = [[by, "planned", "measured", "of it adapter, gradients, optimizer"]]
    for case, figures in found["cases"].items():
        rows.append([case, *(format_bytes(figures[f"{kind}_bytes"]) for kind in ("planned", "measured", "trained"))])
    print(table(rows))
    slopes = (f"{kind.partition('_')[0]} {format_bytes(value)}" for kind, value in found["slope"].items())
    print(f"slope from the first to the last: {', '.join(slopes)} for each of the {by}")


def main() -> int:
    kinds = {"times": (times, show_times), "together": (together, show_together)}
    kinds |= {"depth": (depth, show_peaks), "length": (length, show_peaks)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=list(kinds))
    add_common(parser)
    parser.add_argument("--shape", default="llama-3.2-1b", help="a model of the catalogue (default llama-3.2-1b)")
    parser.add_argument("--seq-len", type=int, help="tokens of a row (default 1024; of a micro-batch: 256)")
    parser.add_argument("--steps", type=int, help="measured (default: times and together 3, depth and length 2)")
    parser.add_argument("--values", type=int, nargs="+", help="depth: numbers of blocks; length: of tokens")
    parser.add_argument("--micro-batches", type=int, default=8, help="together: of a step (default 8)")
    parser.add_argument("--cold", action="store_true", help="together: keep the checkpoint out of the page cache")
    parser.add_argument("--read-limit", type=parse_bytes, help="together: bytes a second of the disk, such as 200MiB")
    options = parser.parse_args()
    options.seq_len = options.seq_len or (256 if options.what == "together" else 1024)
    options.steps = options.steps or (3 if options.what in ("times", "together") else 2)
    measure, show = kinds[options.what]
    return carry_out(options, measure, show)


if __name__ == "__main__":
    command(main)
