"""`python -m tools.quickstart`, what `make quickstart` runs: the main job, end to end, on a real model and real data.

How: model and data are prepared from the package registry (`model`, `data`), then the kit's own commands do the work,
as a user would type them: plan, train, merge, export. What is already there is kept, so a second run is quick and a
killed one continues. Greedy answers to held-out requests are scored before and after (`score`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_kit import files
from qlora_kit.errors import QLoRAKitError
from qlora_kit.units import format_bytes, format_seconds
from tools.quickstart.data import prepare_data
from tools.quickstart.model import NAME, is_proved, prepare_model, prove_model
from tools.quickstart.packages import SetupError
from tools.quickstart.read_back import read_back
from tools.quickstart.score import ScoredRequest, exact_share, scored_requests

RECIPE = Path("recipes/quickstart.yaml")
MODEL, DATA, CACHE, RUN = Path("models") / NAME, Path("data/bfcl"), Path(".cache/quickstart"), Path("runs/quickstart")
ADAPTER, MERGED, GGUF = RUN / "adapter", RUN / "merged", RUN / "model-f16.gguf"


def main() -> None:
    """Run every step; a failure ends in one line and a non-zero exit."""
    started = time.monotonic()
    try:
        _prepare()
        _command("plan", str(RECIPE))
        requests = scored_requests(DATA / "eval.jsonl", DATA / "eval_answers.jsonl")
        before = _answers(requests, None)
        _train()
        after = _answers(requests, ADAPTER)
        merged = _merge() | {"gguf": _export()}
        _report(requests, before, after, merged, time.monotonic() - started)
    except (SetupError, QLoRAKitError) as error:
        sys.exit(f"quickstart: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


def _prepare() -> None:
    """Model and data, each fetched, converted and proved once."""
    print(f"== model {MODEL} and data {DATA}")
    prepare_model(MODEL, CACHE)
    if not is_proved(MODEL):
        prove_model(MODEL, CACHE)
    proof = json.loads((MODEL / "conversion.json").read_text())["proof"]
    for name, measured in proof.items():
        print(f"   {name}: {measured}")
    summary = prepare_data(DATA, CACHE)
    print(f"   {summary.train_records:,} training and {summary.eval_records} held-out records, no function in both")


def _command(*words: str) -> None:
    """Run a command of the kit, shown as a user would type it."""
    print(f"\n== qlora-kit {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "qlora_kit", *words], check=True)


def _train() -> None:
    """Train, or continue the run that a kill has stopped, or keep the one that is complete."""
    if (ADAPTER / "adapter_model.safetensors").is_file():
        print(f"\n== {ADAPTER} is already there: kept (remove {RUN} to train again)")
        return
    resume = bool(list((RUN / "checkpoints").glob("step-*")))
    _command("train", str(RECIPE), "--resume" if resume else "--restart")


def _merge() -> dict[str, Any]:
    """Merge to fp16, reload with plain transformers, compare; kept when it is already there."""
    report = RUN / "merge_proof.json"
    if not report.is_file() or not (MERGED / "merge_report.json").is_file():
        if MERGED.exists():
            files.remove_folder(MERGED)
        words = ["merge", "--model", str(MODEL), "--adapter", str(ADAPTER), "--out", str(MERGED)]
        words += ["--verify", str(DATA / "eval.jsonl"), "--json"]
        print(f"\n== qlora-kit {' '.join(words)}", flush=True)
        run = subprocess.run([sys.executable, "-m", "qlora_kit", *words], check=True, stdout=subprocess.PIPE, text=True)
        files.write_json(report, json.loads(run.stdout))
    return json.loads(report.read_text())


def _export() -> str:
    """A GGUF file straight from base and adapter, kept when it is there, read back against the merged folder."""
    if not GGUF.is_file():
        _command("export", "gguf", "--model", str(MODEL), "--adapter", str(ADAPTER), "--out", str(GGUF))
    return f"{format_bytes(GGUF.stat().st_size)} in {GGUF}, read back: {read_back(GGUF, MERGED)}"


def _answers(requests: Sequence[ScoredRequest], adapter: Path | None) -> list[str]:
    """Greedy answers of the base, or of base and adapter; kept in the run's folder."""
    kept = RUN / f"answers_{'after' if adapter else 'before'}.json"
    ids = [request.id for request in requests]
    if kept.is_file() and (stored := json.loads(kept.read_text()))["ids"] == ids:
        return stored["answers"]
    print(f"\n== {len(requests)} held-out requests to the {'tuned' if adapter else 'untuned'} model", flush=True)
    words = [str(MODEL), str(DATA / "eval.jsonl"), str(DATA / "eval_answers.jsonl"), str(kept)]
    words += [str(adapter)] if adapter else []
    subprocess.run([sys.executable, "-m", "tools.quickstart.answers", *words], check=True)
    return json.loads(kept.read_text())["answers"]


def _evaluations() -> list[float]:
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def _report(
    requests: Sequence[ScoredRequest], before: list[str], after: list[str], merged: dict[str, Any], seconds: float
) -> None:
    """Held-out loss, exact calls, an answer before and after, sizes, and the merged model's check."""
    acceptable = [request.acceptable for request in requests]
    losses, proof = _evaluations(), merged["proof"]
    shares = [exact_share(answers, acceptable) for answers in (before, after)]
    example = _telling_example(requests, before, after)
    adapter_bytes = sum(path.stat().st_size for path in ADAPTER.iterdir())
    rows = {
        "held-out loss": f"{losses[0]:.3f} -> {losses[-1]:.3f} nats per token",
        "exact calls": f"{shares[0]:.0%} -> {shares[1]:.0%} of {len(requests)} held-out requests",
        "adapter": f"{format_bytes(adapter_bytes)} in {ADAPTER}",
        "merged model": f"{format_bytes(merged['bytes_written'])} of {merged['dtype']} in {MERGED}",
        "merged, reloaded": f"loss {proof['merged_loss']:.4f} with plain transformers; adapter model "
        f"{proof['live_loss']:.4f}: {'the same model' if proof['passed'] else 'NOT the same model'}",
        "GGUF file": merged["gguf"],
    }
    print("\n== a held-out request, before and after")
    print(f"   asked   {requests[example].messages[-1]['content']}")
    print(f"   before  {_one_line(before[example])}")
    print(f"   after   {_one_line(after[example])}")
    print("\n== result")
    for name, value in rows.items():
        print(f"   {name:<17} {value}")
    print(f"   {'time':<17} {format_seconds(seconds)}")
    result = {"held_out_loss": [losses[0], losses[-1]], "exact_share": shares, "proof": proof, "seconds": seconds}
    files.write_json(RUN / "quickstart.json", result)


def _telling_example(requests: Sequence[ScoredRequest], before: list[str], after: list[str]) -> int:
    """The first request whose answer became exactly right; else the first."""
    for index, request in enumerate(requests):
        if exact_share([after[index]], [request.acceptable]) > exact_share([before[index]], [request.acceptable]):
            return index
    return 0


def _one_line(text: str, limit: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


if __name__ == "__main__":
    main()
