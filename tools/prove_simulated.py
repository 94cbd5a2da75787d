"""Does the plan hold? Steps of the real training code on a simulated accelerator, planned peak beside measured peak.

    python -m tools.prove_simulated                      every case, one after the other
    python -m tools.prove_simulated 70b-24 7b-3          some of them
    python -m tools.prove_simulated --json > proof.json

Why: there is no GPU here, and what fits on one is the point of this kit. How: the planner decides for a card and a
budget as `plan` does; then transformers' model, the streamer, the loop and bitsandbytes' 8-bit optimizer run a step on
the simulated device (`profiling.simulate`), whose memory is the budget less what a CUDA context takes: one byte more is
an error. Imported by: tests.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from qlora_kit import files
from qlora_kit.planning.hardware import GIB, Device
from qlora_kit.planning.planner import Plan, plan_shapes
from qlora_kit.planning.shapes import catalogue, model_shapes, read_config
from qlora_kit.profiling.simulate import measure
from qlora_kit.recipe import Recipe, recipe_for_model
from qlora_kit.units import format_bytes

STEP = (
    "train.optimizer=adamw_8bit",
    "train.grad_accumulation=2",
    "adapter.rank=16",
    "adapter.target_modules=all-linear",
)


@dataclass(frozen=True)
class Case:
    """One model on one card.

    Attributes:
        card_gib, budget_gib: what the card has, and what of it the run may take.
        host_gib: memory of the host that is free.
        layers: blocks of the model, if not as many as it has.
    """

    name: str
    model: str
    card_gib: float
    budget_gib: float
    overrides: tuple[str, ...] = ()
    host_gib: float = 64
    layers: int | None = None


CASES = [
    Case("70b-32", "llama-3-70b", 32, 30, ("data.seq_len=2048",)),
    Case("70b-32-4096", "llama-3-70b", 32, 30, ("data.seq_len=4096",)),
    Case("70b-24", "llama-3-70b", 24, 22.5, ("data.seq_len=2048",)),
    Case("70b-24-4096", "llama-3-70b", 24, 22.5, ("data.seq_len=4096",)),
    Case("70b-24-host-24", "llama-3-70b", 24, 22.5, ("data.seq_len=2048",), host_gib=24),
    Case("70b-16", "llama-3-70b", 16, 15, ("data.seq_len=2048",)),
    Case("70b-16-4096", "llama-3-70b", 16, 15, ("data.seq_len=4096",)),
    Case("70b-8", "llama-3-70b", 8, 7.5, ("data.seq_len=2048", "memory.activation_offload=host")),
    Case("70b-8-4096", "llama-3-70b", 8, 7.5, ("data.seq_len=4096", "memory.activation_offload=host")),
    Case("7b-3", "llama-2-7b", 3, 2.8, ("data.seq_len=512",)),
    Case("405b-24", "llama-3.1-405b", 24, 22.5, ("data.seq_len=2048", "memory.placement=disk"), host_gib=32),
]


@dataclass(frozen=True)
class Proof:
    """What was planned and what was measured, bytes; the device's without the runtime that is not simulated."""

    case: str
    budget_bytes: int
    resident_blocks: int
    host_blocks: int
    disk_blocks: int
    together: int
    planned_bytes: int
    measured_bytes: int
    planned_host_bytes: int
    measured_host_bytes: int
    seconds: float


def plan_case(case: Case, folder: Path) -> tuple[Recipe, Plan]:
    """The recipe as it runs, its output in `folder`, and its plan."""
    model = _model(case, folder)
    wanted = recipe_for_model(model, [*STEP, f"output={folder / 'run'}", *case.overrides])
    card, budget = int(case.card_gib * GIB), int(case.budget_gib * GIB)
    device = Device("cuda", f"{case.card_gib:g} GiB card", budget, card - budget)
    with mock.patch("qlora_kit.planning.decide.host_memory_bytes", lambda: int(case.host_gib * GIB)):
        plan = plan_shapes(model_shapes(*read_config(model)), wanted, device)
    return plan.placed(wanted), plan


def prove(case: Case) -> Proof:
    """Plan a case, then run it on a device that has what was allowed and no more.

    Raises: torch.OutOfMemoryError: the plan did not hold.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe, plan = plan_case(case, Path(folder))
        runtime, started = plan.components["runtime"], time.monotonic()
        measured = measure(recipe, plan.budget_bytes - runtime)
    return Proof(
        case=case.name,
        budget_bytes=plan.budget_bytes - runtime,
        resident_blocks=plan.resident_blocks,
        host_blocks=plan.host_blocks,
        disk_blocks=plan.streamed_blocks - plan.host_blocks,
        together=recipe.memory.micro_batches_together if isinstance(recipe.memory.micro_batches_together, int) else 1,
        planned_bytes=plan.peak_bytes - runtime,
        measured_bytes=measured.device_bytes,
        planned_host_bytes=plan.phases["train"].host_bytes,
        measured_host_bytes=measured.host_bytes,
        seconds=time.monotonic() - started,
    )


def _model(case: Case, folder: Path) -> str:
    """A name of the catalogue, or a file with its config and another depth."""
    if case.layers is None:
        return case.model
    config: dict[str, Any] = catalogue()[case.model]["config"] | {"num_hidden_layers": case.layers}
    files.write_json(folder / "config.json", config)
    return str(folder / "config.json")


def lines(proofs: Sequence[Proof]) -> Iterator[str]:
    """A Markdown table."""
    columns = "case, blocks on device / host / disk, together, allowed, planned, measured, planned / measured"
    heads = [*columns.split(", "), "host planned", "host measured", "s"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for proof in proofs:
        sizes = (proof.budget_bytes, proof.planned_bytes, proof.measured_bytes)
        hosts = (proof.planned_host_bytes, proof.measured_host_bytes)
        cells = [
            proof.case,
            f"{proof.resident_blocks} / {proof.host_blocks} / {proof.disk_blocks}",
            str(proof.together),
            *map(format_bytes, sizes),
            f"{proof.planned_bytes / proof.measured_bytes:.4f}",
            *map(format_bytes, hosts),
            f"{proof.seconds:.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(names))
    parser.add_argument("--json", action="store_true", help="bytes and seconds of every case")
    given = parser.parse_args(arguments)
    if unknown := set(given.cases) - set(names):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    proofs = []
    for case in CASES:
        if not given.cases or case.name in given.cases:
            print(f"{case.name}: {case.model}, {' '.join(case.overrides)}", file=sys.stderr)
            proofs.append(prove(case))
    print(json.dumps([asdict(proof) for proof in proofs], indent=2) if given.json else "\n".join(lines(proofs)))


if __name__ == "__main__":
    main()
