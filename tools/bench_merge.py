"""Merging against copying the same bytes, and against peft: time and memory, each in a fresh process.

    python -m tools.bench_merge --dir D                            llama-3.2-1b, bf16 base, rank 16 on all linears
    python -m tools.bench_merge --dir D --base FOLDER --no-peft    a base that is there
    python -m tools.bench_merge --dir D --trained nf4 --no-peft    onto the 4-bit copies of the 16-bit base

How: both copies read every byte of the base once, write as many as the merge does, and sync: `copy` as `cp` would,
`past` past the page cache, as the merge does, at the disk's own rate.
Memory is the most that was resident, less what was when the imports were done. `kit` is what `qlora-kit merge` does
without --verify, evidence for the report included; how much of it is evidence has a row of its own. peft's way is
`from_pretrained` in bf16, `merge_and_unload` and `save_pretrained`, which does not sync: the tool does so before the
clock stops.
Imported by nobody.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qlora_kit import files
from qlora_kit.adapters.store import PROVENANCE
from qlora_kit.base.shards import find_shards
from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.units import format_bytes
from tools.harness import add_common, carry_out, command, process_memory, table
from tools.prove_merge_kill import write_adapter
from tools.random_base import random_base

PIECE = 8 << 20


def copy(base: Path, adapter: Path, out: Path, size_bytes: int) -> None:
    """Read the base once and write `size_bytes`, synced."""
    with files.atomic_file(out / "copy") as sink:
        for piece in pieces(base, size_bytes):
            sink.write(piece)


def past(base: Path, adapter: Path, out: Path, size_bytes: int) -> None:
    """The same past the page cache."""
    with files.atomic_file(out / "copy") as sink, files.past_cache(sink) as write:
        for piece in pieces(base, size_bytes):
            write(piece)


def pieces(base: Path, size_bytes: int) -> Iterator[bytes]:
    """`size_bytes` of the base's files, with zeros after their end; all of them are read."""
    left = size_bytes
    for path in find_shards(base):
        with open(path, "rb") as source:
            while piece := source.read(PIECE):
                yield piece[:left]
                left -= len(piece[:left])
    while left > 0:
        yield bytes(min(left, PIECE))
        left -= min(left, PIECE)


def kit(base: Path, adapter: Path, out: Path, size_bytes: int) -> None:
    from qlora_kit.export.merge import merge_model

    merge_model(base, adapter, out, dtype="bfloat16")


def evidence(base: Path, adapter: Path, out: Path, size_bytes: int) -> None:
    from qlora_kit.export.evidence import evidence
    from qlora_kit.export.merge import open_merge

    evidence(open_merge(base, adapter, dtype="bfloat16"))


def peft(base: Path, adapter: Path, out: Path, size_bytes: int) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(out)
    os.sync()


WAYS = {"copy": copy, "past": past, "kit": kit, "evidence": evidence, "peft": peft}


def work(way: str, base: Path, adapter: Path, out: Path, size_bytes: int) -> dict[str, float]:
    """In a process of its own: seconds, and bytes beyond the interpreter with its imports."""
    import qlora_kit.export.merge  # noqa: F401

    if way == "peft":
        import peft
        import transformers

        _ = peft.PeftModel, transformers.AutoModelForCausalLM
    before, started = process_memory()["rss_bytes"], time.monotonic()
    WAYS[way](base, adapter, out, size_bytes)
    return {"seconds": time.monotonic() - started, "bytes": process_memory()["peak_bytes"] - before}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every way once, one after the other."""
    base = options.base or random_base(options.shape, options.dir, layers=options.layers, dense=True)
    shapes = model_shapes(*read_config(str(base)))
    adapter = write_adapter(folder / "adapter", shapes, options.rank, torch.Generator().manual_seed(0))
    if options.trained:
        files.write_json(adapter / PROVENANCE, {"quantization": options.trained, "double_quant": True})
    size_bytes, found = shapes.total_parameters * 2, {}
    for way in [way for way in WAYS if not (way == "peft" and options.no_peft)]:
        out = folder / way
        arguments = ["-m", "tools.bench_merge", "--dir", str(folder), "--work", way, str(base), str(adapter)]
        arguments += [str(out), str(size_bytes)]
        run = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True)
        found[way] = json.loads(run.stdout.splitlines()[-1])
        shutil.rmtree(out, ignore_errors=True)  # evidence writes none
    return {"base": base.name, "bytes_written": size_bytes, **found}


def show(found: dict[str, Any]) -> None:
    copied = found["copy"]["seconds"]
    rate = format_bytes(int(found["bytes_written"] / copied))
    print(f"{found['base']}: {format_bytes(found['bytes_written'])} written; the disk takes {rate}/s, read and synced")
    rows: list[tuple[object, ...]] = [("way", "seconds", "x copy", "beyond imports")]
    for way in WAYS:
        if way in found:
            taken = found[way]
            rows.append((way, taken["seconds"], taken["seconds"] / copied, format_bytes(int(taken["bytes"]))))
    print(table(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser)
    parser.add_argument("--shape", default="llama-3.2-1b", help="a model of the catalogue (default llama-3.2-1b)")
    parser.add_argument("--base", type=Path, help="a base that is there, instead of a random one")
    parser.add_argument("--trained", choices=("nf4", "fp4"), help="what the adapter says that it was trained beside")
    parser.add_argument("--no-peft", action="store_true", help="leave peft out")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        way, base, adapter, out, size_bytes = options.work
        print(json.dumps(work(way, Path(base), Path(adapter), Path(out), int(size_bytes))))
        return 0
    return carry_out(options, measure, show)


if __name__ == "__main__":
    command(main)
