"""`qlora-kit plan` against `accelerate estimate-memory`: wall time of fresh processes, in turn, of the same model.

    python -m tools.bench_plan                                   Llama-3.1-70B, 7 processes of each: docs' figure
    python -m tools.bench_plan --model qwen2.5-7b --runs 3

Without a hub: accelerate's command asks it whether the model is there before it looks at a local folder, and refuses a
folder's name. So that one question (`verify_on_hub`) is answered here, which spares it the network's time; all else is
its own command, given a folder with the config. A first run of each fills the system's file cache and is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qlora_kit import files
from qlora_kit.errors import QLoRAKitError
from qlora_kit.planning.shapes import read_config
from tools.harness import ROOT, command, table

GPU = "rtx-4090"
ACCELERATE = """
import sys
from types import SimpleNamespace
from accelerate.commands import accelerate_cli, estimate

estimate.verify_on_hub = lambda *_: SimpleNamespace(config={})
sys.argv = ["accelerate", "estimate-memory", sys.argv[1], "--library_name", "transformers"]
accelerate_cli.main()
"""


def seconds_of(arguments: list[str], codes: tuple[int, ...] = (0,)) -> float:
    """Wall time of a fresh interpreter, its output read. Raises: QLoRAKitError: it ended with another code."""
    started = time.monotonic()
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    elapsed = time.monotonic() - started
    if run.returncode not in codes or not run.stdout.strip():
        raise QLoRAKitError(f"{' '.join(arguments)[:80]} ended with code {run.returncode}:\n{run.stderr[-1000:]}")
    return elapsed


def measure(model: str, runs: int) -> dict[str, list[float]]:
    """Seconds of each process of both, in turn, after one of each that is not counted.

    Args:
        model: a name of the catalogue, or a folder.
    """
    found: dict[str, list[float]] = {"qlora-kit plan": [], "accelerate estimate-memory": []}
    with tempfile.TemporaryDirectory() as folder:
        files.write_text(Path(folder) / "config.json", json.dumps(read_config(model)[0]))
        contenders = {
            "qlora-kit plan": (["-m", "qlora_kit", "plan", model, "--gpu", GPU], (0, 6)),  # 6: does not fit
            "accelerate estimate-memory": (["-c", ACCELERATE, folder], (0,)),
        }
        for number in range(runs + 1):
            for name, (arguments, codes) in contenders.items():
                seconds = seconds_of(arguments, codes)
                if number:
                    found[name].append(seconds)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="llama-3.1-70b", help="of the catalogue, or a folder (default llama-3.1-70b)"
    )
    parser.add_argument("--runs", type=int, default=7, help="processes of each that are counted (default 7)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args()
    found = measure(options.model, options.runs)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    kit, other = medians.values()
    if options.json:
        print(json.dumps({"model": options.model, "seconds": found, "medians": medians, "ratio": kit / other}))
        return 0
    rows: list[list[object]] = [["process", "median, s", "fastest, s", "slowest, s"]]
    rows += [[name, medians[name], min(seconds), max(seconds)] for name, seconds in found.items()]
    print(table(rows))
    print(f"ratio {kit / other:.3f}, that is 1/{other / kit:.1f}")
    return 0


if __name__ == "__main__":
    command(main)
