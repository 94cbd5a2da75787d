"""bf16 adapters that learn like fp32 ones? The same recipe with each kind of adapter, over several seeds.

`python -m tools.prove_adapter_dtype RECIPE [--steps 60] [--seeds 0 1 2] [--set KEY=VALUE] [--out FILE.json]` trains an
fp32 adapter, a bf16 one with master weights and a bf16 one without, on the same batches in the same order, one after
the other in this process. It prints a table and writes each step's loss as JSON; no adapter is kept.
Losses hide what rounding takes, since B starts at zero, where bf16 is fine, and learns in place of A. So A is looked at
too: the cosine between what was added to it and what was added to the fp32 one. The smaller the rate, the more is lost:
`--set train.lr=1e-4`. Numbers for docs/benchmarks.md. Imported by nobody.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from qlora_kit.console import note
from qlora_kit.files import write_json
from qlora_kit.recipe import Recipe, load_recipe
from qlora_kit.training.evaluate import evaluate
from qlora_kit.training.loop import train_step
from qlora_kit.training.run import Run, prepare
from qlora_kit.training.signals import StopRequest

REFERENCE = "fp32"
ADAPTERS = {
    REFERENCE: ("adapter.dtype=float32",),
    "bf16 with master weights": ("adapter.dtype=bfloat16", "train.master_weights=true"),
    "bf16 without": ("adapter.dtype=bfloat16", "train.master_weights=false"),
}


@dataclass(frozen=True)
class Curve:
    """One run.

    Attributes:
        losses: nats per learned token of each step's batch.
        held_out_loss: nats per token of the held-out data, after the last step.
        change_cosine: between the change of all A since the start and that of the fp32 run with the same seed.
    """

    adapter: str
    seed: int
    losses: list[float]
    held_out_loss: float
    change_cosine: float


def train_seed(recipe: Path, seed: int, overrides: list[str]) -> Iterator[Curve]:
    """A run of each kind of adapter, fp32 first."""
    reference = None
    for adapter, settings in ADAPTERS.items():
        asked = load_recipe(recipe, [*overrides, *settings, f"train.seed={seed}"])
        losses, held_out_loss, change = train_adapter(asked)
        reference = change if reference is None else reference
        curve = Curve(adapter, seed, losses, held_out_loss, cosine_similarity(change, reference, dim=0).item())
        note(f"seed {seed}, {adapter}: held-out loss {held_out_loss:.4f}, cosine {curve.change_cosine:.4f}")
        yield curve


def train_adapter(recipe: Recipe) -> tuple[list[float], float, Tensor]:
    """Losses, held-out loss at the end, change of all A as one fp64 vector."""
    run = prepare(recipe, StopRequest())
    start = _all_A(run)
    losses = [train_step(run)["loss"] for _ in range(run.total_steps)]
    return losses, evaluate(run.base, run.held_out, run.chunk_tokens).loss, _all_A(run) - start


def _all_A(run: Run) -> Tensor:
    values = [value.detach().flatten() for name, value in run.parameters.items() if name.endswith("lora_A")]
    return torch.cat(values).double().cpu()


def apart(curve: Curve, reference: Curve) -> float:
    """Mean over the steps of how far two runs' losses are from each other, nats per token."""
    return mean(abs(a - b) for a, b in zip(curve.losses, reference.losses, strict=True))


def table(curves: list[Curve]) -> Iterator[str]:
    """Lines of a Markdown table: mean and standard deviation over the seeds, one row an adapter."""
    references = {curve.seed: curve for curve in curves if curve.adapter == REFERENCE}
    yield "| adapter | held-out loss at the end | loss of a step, distance to fp32 | change of A, cosine with fp32 |"
    yield "|---|---|---|---|"
    for adapter in ADAPTERS:
        of_adapter = [curve for curve in curves if curve.adapter == adapter]
        held_out = _spread([curve.held_out_loss for curve in of_adapter])
        distance = _spread([apart(curve, references[curve.seed]) for curve in of_adapter])
        cosine = _spread([curve.change_cosine for curve in of_adapter])
        yield f"| {adapter} | {held_out} | {distance} | {cosine} |"


def _spread(values: list[float]) -> str:
    deviation = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="with held-out data (data.eval)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--out", type=Path, help="JSON file for every loss")
    arguments = parser.parse_args()
    overrides = [*arguments.overrides, f"train.steps={arguments.steps}", "train.epochs=null"]
    curves = [curve for seed in arguments.seeds for curve in train_seed(arguments.recipe, seed, overrides)]
    print("\n".join(table(curves)))
    if arguments.out is not None:
        write_json(arguments.out, {"overrides": overrides, "curves": [asdict(curve) for curve in curves]})


if __name__ == "__main__":
    main()
