"""A CPU run's plan against its process: what `qlora-kit train` takes of resident memory, beside what was planned.

    python -m tools.prove_rss --dir D          models of 0.3 to 0.7 GB are made there once, some minutes

Why: on a CPU the budget is the process' own memory, and nobody but the kernel counts it. How: for each case a random
base (tools/random_base.py) with a tokenizer of made-up words and data of them; `qlora-kit train` runs three steps in a
fresh process, and its `memory.json` says what it held with all libraries imported and what it held at most (VmHWM).
The difference of both stands beside the planned peak.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit import files
from qlora_kit.planning.calibration import OFF
from qlora_kit.units import format_bytes
from tools.harness import add_common, carry_out, command, table, write_recipe

TOLERANCE = 0.07
STEPS = 3
WORDS = 1000
DISK = {"memory.placement": "disk", "memory.resident_blocks": 0, "memory.embeddings": "disk"}


@dataclass(frozen=True)
class Case:
    """A shape cut to some blocks, and what its recipe says besides."""

    name: str
    shape: str
    layers: int
    values: dict[str, Any] = field(default_factory=dict)
    dense: bool = False
    lengths: tuple[float, float] | None = None  # of documents, shares of seq_len; None: all as long as a row


CASES = (
    Case("1B x 4, on the device", "llama-3.2-1b", 4),
    Case("1B x 4, 2048 tokens", "llama-3.2-1b", 4, {"data.seq_len": 2048}),
    Case("1B x 4, from disk", "llama-3.2-1b", 4, DISK),
    Case("1B x 4, packing", "llama-3.2-1b", 4, lengths=(0.04, 1)),
    Case(
        "1B x 4, rows of all lengths",
        "llama-3.2-1b",
        4,
        {"train.grad_accumulation": 16, "data.packing": False},
        lengths=(0.04, 1),
    ),
    Case("135M, as the quickstart", "smollm2-135m", 30, {"memory.budget": 1 << 30}, False, (0.6, 1)),
    Case("1B x 4, rank 64, AdamW", "llama-3.2-1b", 4, {"adapter.rank": 64, "train.optimizer": "adamw"}),
    Case("1B x 4, kept activations", "llama-3.2-1b", 4, {"memory.gradient_checkpointing": False}),
    Case("1B x 4, tight budget", "llama-3.2-1b", 4, {"memory.budget": 1000 << 20}),
    Case("7B x 4, on the device", "llama-2-7b", 4, {"data.seq_len": 256}),
    Case("7B x 4, tight budget", "llama-2-7b", 4, {"data.seq_len": 256, "memory.budget": 1300 << 20}),
    Case("1B x 4, bf16", "llama-3.2-1b", 4, dense=True),
)


def write_tokenizer(folder: Path) -> None:
    """A word a token, `w0` to `w999`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    wrapped.save_pretrained(folder)


def words() -> list[str]:
    return [f"w{number}" for number in range(WORDS)]


def write_data(path: Path, seq_len: int, shares: tuple[float, float] | None) -> None:
    """Documents of full length, or of lengths between two shares of it."""
    generator, known = random.Random(0), words()
    low, high = (int(share * seq_len) for share in shares or (1, 1))
    lengths = [generator.randint(low, high) - 1 for _ in range(60 if shares else 8)]
    rows = (json.dumps({"text": " ".join(generator.choices(known, k=length))}) for length in lengths)
    files.write_text(path, "".join(f"{row}\n" for row in rows))


def run_case(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train in a fresh process; planned and measured bytes."""
    from tools.random_base import random_base

    model = random_base(case.shape, options.dir, layers=options.layers or case.layers, dense=case.dense)
    if not (model / "tokenizer.json").exists():
        write_tokenizer(model)
    data = folder / "data.jsonl"
    values = {
        "data.seq_len": 512,
        "adapter.rank": options.rank,
        "data.packing": True,
        "train.grad_accumulation": 2,
    } | case.values
    values |= {"data.eval": str(data)} if case.lengths else {}  # evaluations, too, see rows of all lengths
    write_data(data, values["data.seq_len"], case.lengths)
    values |= {"model.quantization": "none" if case.dense else "nf4", "train.device": "cpu"}
    values |= {"data.train": str(data), "data.format": "text", "train.steps": STEPS}
    path, recipe, plan = write_recipe(folder, model, values, options.set)
    train(path, options.threads)
    memory = json.loads((Path(recipe.output) / "memory.json").read_text())
    shutil.rmtree(recipe.output)
    measured = memory["measured"]
    off = plan.peak_bytes / measured["peak_bytes"] - 1
    return {"case": case.name, "planned": plan.peak_bytes, "components": dict(plan.components), "off": off} | {
        "measured": measured
    }


def train(recipe: Path, threads: int | None) -> None:
    """`qlora-kit train` as a user would run it, in a process of its own."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    words = [sys.executable, "-m", "qlora_kit", "train", str(recipe), "--restart"]
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every case, or those that `--only` names."""
    chosen = [case for case in CASES if options.only in case.name]
    return {"cases": [run_case(case, options, folder) for case in chosen]}


def show(found: dict[str, Any]) -> None:
    rows: list[list[object]] = [["case", "libraries", "planned", "measured", "off"]]
    for case in found["cases"]:
        measured = case["measured"]
        sizes = (measured["interpreter_bytes"], case["planned"], measured["peak_bytes"])
        rows.append([case["case"], *map(format_bytes, sizes), f"{100 * case['off']:+.1f} %"])
    print(table(rows))
    worst = max(abs(case["off"]) for case in found["cases"])
    print(f"furthest off: {100 * worst:.1f} %; at most {100 * TOLERANCE:.0f} % are allowed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    os.environ[OFF] = "1"  # the plan's constants are on trial, not what was measured here before
    return carry_out(parser.parse_args(), measure, show)


if __name__ == "__main__":
    command(main)
