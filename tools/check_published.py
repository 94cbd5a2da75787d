"""How far are planned peaks from published ones? One line a tier, and the rows that are over their limit.

    python -m tools.check_published POINTS.jsonl
    python -m tools.check_published POINTS.jsonl --json

Why: other stacks' peaks were measured on real GPUs, some to the byte, so they judge the formulas of `plan --stack`.
How: each row names a model's shape, a setting and versions; these make shapes, a recipe and a row of STACKS or
PUBLISHED, and nothing of the row's peak goes in. The file of points is not part of this repository. Tiers: 1,
byte-exact peaks of torch's allocator (fms-acceleration); 1b, litgpt; 1c, fsdp_qlora; 2, peaks whose length or measure
is not wholly known; bounds, where only "fits" or "does not" was said. Imports no torch. Imported by: tests.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from qlora_kit.errors import QLoRAKitError
from qlora_kit.planning.moments import total
from qlora_kit.planning.shapes import ModelShapes, model_shapes
from qlora_kit.planning.stack_moments import CUBLAS_BYTES, in_stack, stack_peak, static_ledger
from qlora_kit.planning.stacks import Stack, find_stack
from qlora_kit.recipe import Recipe, recipe_for_model

Row = dict[str, Any]
LIMITS = {"1": 0.03, "1b": 0.07, "1c": 0.07, "2": 0.15}
STATIC_LIMIT = 0.01
BOUND_MARGIN = 0.05
T4_BYTES = int(14.75 * 2**30)  # of a 16 GB card
TIERS = (("1", r"fms-"), ("1b", r"litgpt-|raschka-"), ("1c", r"fsdpq-"), ("2", r"tt-|axolotl-|unsloth-nb-"))
# Names that say what a shape alone does not; the first that is found counts.
MODEL_TYPES = (
    ("bigcode", "gpt_bigcode"),
    ("mixtral", "mixtral"),
    ("phi-1|phi-2", "phi"),
    ("phi-?[34]", "phi3"),
    ("gemma-?2-", "gemma2"),
    ("gemma", "gemma"),
    ("qwen3", "qwen3"),
    ("qwen2", "qwen2"),
    ("mistral|devstral|magistral", "mistral"),
)
PHI3_NAMES = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}  # what a row calls a linear -> what Phi-3 does


@dataclass(frozen=True)
class Check:
    """One row: what was planned and what was published, in bytes; None where the row does not say."""

    id: str
    tier: str
    planned: int
    published: int
    moment: str
    static_planned: int
    static_published: int | None

    @property
    def error(self) -> float:
        """Of the peak; negative when less was planned."""
        return self.planned / self.published - 1

    @property
    def static_error(self) -> float | None:
        """Of what is allocated between two steps."""
        return None if self.static_published is None else self.static_planned / self.static_published - 1

    @property
    def over_limit(self) -> bool:
        """Whether the peak or the static bytes miss by more than their tier allows."""
        return abs(self.error) > LIMITS[self.tier] or abs(self.static_error or 0) > STATIC_LIMIT


# ------------------------------------------------------------------------------------------- from a row to a plan


def tier_of(row: Row) -> str | None:
    """The tier of a row that can judge: a training peak on one GPU of a bf16 or 4-bit base."""
    tier = next((tier for tier, pattern in TIERS if re.match(pattern, row["id"])), None)
    one_gpu = row["num_gpus"] == 1 or row["id"].startswith("fsdpq-nb")
    if tier is None or not one_gpu or row["kind"] != "train_peak" or not row.get("peak_bytes"):
        return None
    quant = str(row["quant"]).split()[0]
    return tier if quant in ("nf4", "fp4", "bf16") and (tier == "2" or row["completeness"] == "complete") else None


def model_type_of(row: Row) -> str:
    """transformers' name of the row's architecture; a gated MLP that no name tells apart is Llama's.

    litgpt has one model for all of them, in which q, k and v have branches of their own, and so have gate and up.
    """
    if row["arch"].get("experts"):
        return "mixtral"
    if row["id"].startswith("litgpt") and row["arch"]["mlp"] in ("swiglu", "gelu2"):
        return "llama" if row["arch"]["mlp"] == "swiglu" else "phi"
    named = next((kind for pattern, kind in MODEL_TYPES if re.search(pattern, row["model"].lower())), None)
    return named or ("gpt_neox" if row["arch"]["mlp"] == "gelu2" else "llama")


def config_of(row: Row) -> dict[str, Any]:
    """A config.json of the row's shape."""
    arch = row["arch"]
    config = {
        "model_type": model_type_of(row),
        "hidden_size": arch["hidden"],
        "num_hidden_layers": arch["layers"],
        "num_attention_heads": arch["heads"],
        "num_key_value_heads": arch["kv_heads"],
        "intermediate_size": arch["intermediate"],
        "n_inner": arch["intermediate"],
        "head_dim": arch["head_dim"],
        "vocab_size": arch["vocab"],
        "tie_word_embeddings": arch["tie_embeddings"],
        "n_positions": 2048,
    }
    if arch.get("experts"):
        config |= {"num_local_experts": arch["experts"], "num_experts_per_tok": arch["experts_per_tok"]}
    return config


def stack_of(row: Row) -> str:
    """The row of STACKS or PUBLISHED that the versions and switches in the note name."""
    if row["id"].startswith(("litgpt-rt", "raschka")):
        return "litgpt-longest-first"
    if row["id"].startswith("litgpt"):
        return "litgpt"
    if row["id"].startswith("fsdpq-nb"):
        return "fsdp_qlora-notebook"
    note, loss = row["note"], row["loss_impl"] or ""
    if row["id"].startswith("tt-"):
        offload = "-offload" if "offloading" in str(row["grad_checkpointing"]) else ""
        return f"torchtune-chunked{offload}" if "Chunked" in loss else "torchtune"
    if row["id"].startswith("axolotl"):
        return "axolotl-cce" if "cut cross" in loss else "axolotl"
    if row["id"].startswith("unsloth-ctx"):
        return "tf4.48-kbit" if "HF" in row["id"] else "unsloth-cce"
    for start, name in (("unsloth", "unsloth"), ("hfblog", "tf4.30"), ("qlora", "qlora-paper")):
        if row["id"].startswith(start):
            return name
    version = "tf4.48" if "transformers4.48" in note else "tf4.45"
    if "baseline-peft-bnb" in note:
        return f"{version}-kbit"
    kernels = "-foak" if "foak" in note else ""
    return version + kernels + ("-liger" if "liger" in row["id"].split("foak")[-1] else "")


def recipe_of(row: Row, shapes: ModelShapes) -> Recipe:
    """The row's setting. A head that is trained too is not in the recipe: its adapter is a few MB."""
    quant = str(row["quant"]).split()[0]
    present = {linear.name.rpartition(".")[2] for linear in shapes.linears}
    names = PHI3_NAMES if shapes.model_type == "phi3" else {}
    wanted = row["targets"] or ["q_proj", "v_proj"]
    targets = [name for name in (names.get(target, target) for target in wanted) if name in present]
    if len(wanted) >= 7:
        targets = []
    optimizer = row["optimizer"].lower()
    paged, small = "paged" in optimizer, "8bit" in optimizer
    changes = {
        "model.quantization": "none" if quant == "bf16" else quant,
        "model.double_quant": bool(row["double_quant"]),
        "adapter.rank": row["rank"] or 8,
        "adapter.dropout": row["lora_dropout"] or 0.0,
        "adapter.target_modules": f"[{', '.join(dict.fromkeys(targets))}]" if targets else "all-linear",
        "data.seq_len": row["seq_len"],
        "data.packing": "false",
        "train.micro_batch": row["micro_batch"],
        "train.grad_accumulation": 8 if row["id"].startswith(("litgpt", "raschka")) else 1,
        "train.optimizer": "paged_adamw_32bit" if paged else "adamw_8bit" if small else "adamw",
        "memory.gradient_checkpointing": str(row["grad_checkpointing"]).split()[0] not in ("False", "off"),
    }
    return recipe_for_model("llama-2-7b", [f"{key}={value}" for key, value in changes.items()])


def check_row(row: Row, tier: str) -> Check:
    """Plan a row. Raises: QLoRAKitError, KeyError: the row does not say enough."""
    if not row["seq_len"]:
        raise KeyError("seq_len")
    shapes = model_shapes(config_of(row), row["id"], planned_only=True)
    stack: Stack = find_stack(stack_of(row))
    recipe = in_stack(recipe_of(row, shapes), stack)
    moment, ledger = stack_peak(shapes, recipe, stack, CUBLAS_BYTES)
    static = total(static_ledger(shapes, recipe, stack, CUBLAS_BYTES))
    published = row["peak_bytes"] or T4_BYTES
    return Check(row["id"], tier, total(ledger), published, moment, static, row.get("static_alloc_bytes"))


def check_bound(row: Row) -> Check | None:
    """Plan a row that only says "fits" or "does not", of one GPU and a 4-bit base; None: it is no such row."""
    if row["kind"] != "bound" or row["num_gpus"] != 1 or str(row["quant"]).split()[0] not in ("nf4", "fp4"):
        return None
    return check_row(row, "does not fit" if row["note"].startswith("OOM") else "fits")


def on_the_right_side(check: Check) -> bool:
    """Whether the plan of a bound says what was published, with a margin."""
    return check.error <= BOUND_MARGIN if check.tier == "fits" else check.error >= -BOUND_MARGIN


# ------------------------------------------------------------------------------------------------------- the table


def check_all(rows: Iterable[Row]) -> tuple[list[Check], list[str]]:
    """Every row that can judge: planned, or the reason why not."""
    checks, unanswered = [], []
    for row in rows:
        if (tier := tier_of(row)) is None:
            continue
        try:
            checks.append(check_row(row, tier))
        except (QLoRAKitError, KeyError) as error:
            unanswered.append(f"{row['id']}: {type(error).__name__}: {error}")
    return checks, unanswered


def table(checks: list[Check], unanswered: list[str]) -> Iterator[str]:
    """Lines of the accuracy table, in markdown."""
    yield "| tier | rows answered | median error | worst error | worst under-prediction | worst static | over limit |"
    yield "|---|---|---|---|---|---|---|"
    for tier, pattern in TIERS:
        of_tier = [check for check in checks if check.tier == tier]
        rows = len(of_tier) + sum(re.match(pattern, name) is not None for name in unanswered)
        if not of_tier:
            yield f"| {tier} | 0 / {rows} | - | - | - | - | - |"
            continue
        errors = [check.error for check in of_tier]
        static = [abs(check.static_error) for check in of_tier if check.static_error is not None]
        under = min(errors)
        cells = (
            f"{len(of_tier)} / {rows}",
            f"{median(map(abs, errors)):.2%}",
            f"{max(map(abs, errors)):.2%}",
            f"{under:.2%}" if under < 0 else "none",
            f"{max(static):.2%}" if static else "-",
            f"{sum(check.over_limit for check in of_tier)} (limit {LIMITS[tier]:.0%})",
        )
        yield f"| {tier} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or all checks as JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("points", type=Path, help="published peaks, one JSON object a line")
    parser.add_argument("--json", action="store_true", help="every row as JSON")
    parser.add_argument("--rows", action="store_true", help="every row, not only those over their limit")
    options = parser.parse_args(arguments)
    with options.points.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    checks, unanswered = check_all(rows)
    bounds = [check for row in rows if (check := check_bound(row)) is not None]
    if options.json:
        found = {"checks": checks, "bounds": bounds}
        text = {name: [asdict(check) for check in of_kind] for name, of_kind in found.items()}
        json.dump(text | {"unanswered": unanswered}, sys.stdout, indent=1)
        return 0
    print("\n".join(table(checks, unanswered)))
    right = [check for check in bounds if on_the_right_side(check)]
    print(f"bounds: {len(right)} of {len(bounds)} on the right side")
    for check in bounds:
        if check not in right:
            print(f"{check.id}: {check.tier}, planned {check.planned:,} for {check.published:,}")
    for check in checks:
        if options.rows or check.over_limit:
            static = "" if check.static_error is None else f", static {check.static_error:+.2%}"
            print(f"{check.id}: {check.error:+.2%} ({check.planned:,} for {check.published:,}, {check.moment}{static})")
    print("\n".join(f"not answered: {line}" for line in unanswered))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
